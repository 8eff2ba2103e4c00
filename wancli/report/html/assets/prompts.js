// Prompts as the encoder reads them, how far the injected ones are from the main one, and given pictures.

function drawPrompts(shot) {
  const root = body('text');
  root.replaceChildren();
  if (!hasManifest(shot)) return root.append(noManifest(shot));
  const texts = shot.prompts.map((index) => data.prompts[index]);
  const rules = rulesOf(shot);
  const injected = rules.flatMap((rule, i) => (rule.picture ? [] : [`inject ${i}`]));
  const names = [shot.timeline ? segmentNames(shot, texts[0]) : 'prompt', ...(shot.negative ? ['negative'] : []), ...injected];
  const width = modelOf(shot).sizes.text_dim;
  root.append(
    table(['text', 'role', 'tokens', 'characters', 'embedding', 'in the cache', 'padded'], texts.map((text, i) => [
      h('span', { class: 'prompt' }, text.text || '(empty)'), names[i] ?? (segmentNames(shot, text) || 'steering'), String(text.tokens) + (text.truncated ? ', cut' : ''), String([...text.text].length),
      `[${text.max_tokens ?? 256}, ${count(width)}]`, shot.cached[i] ? 'yes' : 'encoded now', size(4 * (text.max_tokens ?? 256) * width)])),
    muted('Stored without zero rows. Every block reads 512 rows: the tokens, and one row for all padding, which is not masked and takes part in the softmax.'));
  if (shot.timeline) root.append(...drawTimeline(shot));
  root.append(...drawPictures(shot), ...drawRules(shot));
  if (!rules.length) root.append(muted('This shot injects no prompt. wancli diff A B compares two prompts without a render.'));
  rules.forEach((rule, i) => root.append(...differenceOf(shot, rule, rules.length > 1 ? `Rule ${i}` : 'How different')));
  return root;
}

// What acts on the blocks beside the prompt: rules, emphasis, steering.
function drawRules(shot) {
  const rows = data.rule_rows[shot.rule_rows];
  if (!rows.length) return [];
  return [h('h3', {}, 'Rules'), table(['rule', 'what', 'how', 'blocks', 'steps', 'where'],
    rows.map((row) => [row.rule, h('span', { class: 'prompt' }, row.what), row.how, row.blocks, row.steps, row.where]), { id: 'rules' })];
}

function segmentNames(shot, text) {
  const own = (shot.timeline?.segments ?? []).filter((segment) => segment.id === text.id);
  return own.map((segment) => `frames ${segment.frames.join('–')}`).join(', ');
}

const DESCRIPTIONS = {
  cut: () => 'Cut: each frame reads the prompt of its segment.',
  crossfade: (fade) => `Crossfade: ${fade} frames around each border read both prompts.`,
  relay: () => 'Relay: all frames read one text; the words of a segment count little outside of it.',
};

// The segments of a prompt that changes over the frames, each as wide as it is long.
function drawTimeline(shot) {
  const { segments, blend, fade } = shot.timeline;
  const parts = segments.map((segment) => {
    const [first, last] = segment.frames;
    return h('li', { style: { 'flex-grow': last + 1 - first }, title: segment.text }, h('strong', {}, `${first}–${last}`), ` ${segment.text}`);
  });
  return [h('h3', {}, 'Prompt over time'), h('ol', { class: 'timeline' }, parts), muted(DESCRIPTIONS[blend](fade))];
}

const picturesOf = (shot) => (shot.pictures ?? []).map((index) => data.pictures[index]);

function pictureOf(picture, kind) {
  const alt = kind === 'frame' ? `${picture.name} as the model saw it` : picture.name;
  return picture[kind] ? h('img', { src: picture[kind], alt }) : h('div', { class: 'none' }, 'picture moved or changed');
}

function drawPictures(shot) {
  if (!picturesOf(shot).length) return [];
  const side = (picture, kind, text) => h('figure', { class: 'given' }, pictureOf(picture, kind), h('figcaption', {}, text));
  return [
    h('h3', {}, 'Pictures'),
    ...picturesOf(shot).map((picture) => h('div', { class: 'givens' },
      side(picture, 'picture', `${picture.role}: ${picture.name}, ${picture.size.join(' × ')}, orient ${picture.orient}, alpha ${picture.alpha}`),
      side(picture, 'frame', `as the model saw it: ${shot.width} × ${shot.height}, ${picture.how}`))),
  ];
}

function differenceOf(shot, rule, title) {
  if (rule.picture) return [h('h3', {}, title), muted(`The rule injects a picture, ${rule.picture}, into what blocks read of pictures.`)];
  const found = data.differences[rule.difference];
  const pieces = [shot.prompts.map((index) => data.prompts[index])[0], data.prompts.find((text) => text.id === rule.text)].map((text) => text?.pieces ?? null);
  const shared = new Set(pieces[0] && pieces[1] ? pieces[0].filter((piece) => pieces[1].includes(piece)) : []);
  const side = (name, prompt, own) => h('div', {}, h('h3', {}, `${name}: ${prompt.tokens} tokens, ${prompt.characters} characters`),
    own ? h('div', { class: 'tokens' }, own.map((piece) => h('span', { class: `token${shared.has(piece) ? ' shared' : ''}` }, piece.replaceAll('▁', '␣'))))
      : [h('p', { class: 'prompt' }, prompt.text), muted('This manifest is of an earlier wancli and has no tokens; rendering again records them.')]);
  const verdict = found.verdict;
  const band = { different: 'good', 'too similar': 'bad' }[verdict.band] ?? '';
  const rows = [['relative L2', 'relative_l2', figure, '√2 for unrelated rows; shifts with every inserted word'], ['pooled cosine', 'pooled_cosine', figure, 'between the mean rows'], ['token-set distance', 'token_set_distance', (v) => percent(v), '0 for the same tokens, 100 % for none alike; word order does not count']];
  return [
    h('div', { class: 'cols' }, side('A, main', found.a, pieces[0]), side('B, injected', found.b, pieces[1])),
    h('h3', {}, title),
    h('p', {}, h('strong', { class: band, 'data-percent': verdict.percent }, `${verdict.percent.toFixed(0)} %, ${verdict.band}`), ` by the ${verdict.figure}. Aim for more than 50 %: the dashed line. Dashed tokens are in both prompts.`),
    h('div', { class: 'cols' },
      table(['figure', 'raw', 'projected', 'meaning'], [
        ...rows.map(([label, key, unit, meaning]) => [label, unit(found.raw[key]), found.projected ? unit(found.projected[key]) : '–', meaning]),
        ['legacy changed-percent', `${found.legacy_trimmed_percent.toFixed(1)} %`, `${found.legacy_padded_percent.toFixed(1)} %`, 'left trimmed, right padded to 512; |a − b| > 0.01, depends on scale and padding'],
      ], { class: 'figures' }),
      found.blocks.length ? h('div', {}, h('h3', { style: { 'margin-top': '0' } }, 'K/V distance per block'),
        bars({ values: found.blocks, top: 1, half: 0.5, title: 'Token-set distance of keys and values in each block', unit: (v) => percent(v, 0) }))
        : muted('Per-block figures need the transformer: wancli diff A B --model DIR.')),
    found.hints.length ? h('ul', { class: 'muted small' }, found.hints.map((hint) => h('li', {}, hint))) : null,
  ].filter(Boolean);
}
