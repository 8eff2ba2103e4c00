// The stages of one shot from text to video, with their real shapes.

const shape = (...sizes) => `[${sizes.map(count).join(', ')}]`;

function stage(title, dims, ...notes) {
  return h('li', {}, h('h3', {}, title), h('div', { class: 'shape' }, dims), notes.map((text) => h('p', {}, text)));
}

function drawPipeline(shot) {
  const root = body('pipeline');
  root.replaceChildren();
  if (!hasManifest(shot)) return root.append(noManifest(shot));
  const model = modelOf(shot);
  const wan = model.sizes;
  const stride = wan.in_dim === 48 ? 32 : 16;
  const [t, y, x] = [(shot.frames - 1) / 4 + 1, shot.height / (stride / 2), shot.width / (stride / 2)];
  const values = wan.in_dim * 4;
  const texts = (shot.prompts ?? []).map((index) => data.prompts[index]);
  const rendered = texts.length > 0;
  const limit = rendered ? texts[0].max_tokens ?? 256 : 256;
  const forwards = rendered ? stepsOf(shot).reduce((sum, branches) => sum + branches.length, 0) : shot.steps * (shot.guidance === 1 ? 1 : 2);
  const rules = rulesOf(shot);
  root.append(
    h('p', {}, h('strong', {}, shot.id), ` on ${model.variant}: `, `${shot.width} × ${shot.height}, ${pluralize(shot.frames, 'frame')} make${shot.frames === 1 ? 's' : ''} `,
      h('strong', { id: 'tokens' }, count(shot.tokens)), ' video tokens. ',
      `The VAE turns 4 frames into one after the first, (${shot.frames} − 1) / 4 + 1 = ${t}, and ${stride / 2} × ${stride / 2} pixels into one; `
      + `a patch is 1 × 2 × 2 of those, so a token stands for ${stride} × ${stride} pixels: ${t} × ${y / 2} × ${x / 2} = ${count(shot.tokens)}. `
      + 'Work among tokens grows with their square, memory in proportion.'),
    h('ol', { class: 'flow' },
      stage('Prompts', rendered ? `${texts.map((p) => p.tokens).join(' + ')} tokens` : `up to ${limit} tokens`,
        rendered ? `main${shot.negative ? ', negative' : ''}${rules.length ? `, ${rules.length} injected` : ''}; </s> counted` : 'cleaned, cut into pieces, </s> at the end'),
      stage('Text encoder UMT5', shape(limit, wan.text_dim), 'per prompt; rows past its tokens are zero', rendered ? `${shot.cached.filter(Boolean).length} of ${texts.length} from the cache` : 'computed once, kept on disk'),
      stage('Text projection', shape(wan.text_len, wan.dim), 'what every block reads; no row is masked'),
      stage('Noise', shape(wan.in_dim, t, y, x), rendered ? `seed ${shot.seed}, drawn on the ${shot.noise.toUpperCase()}` : 'channels, time, rows, columns'),
      stage('Patches', shape(shot.tokens, values), `1 × 2 × 2 of ${wan.in_dim} channels: ${values} values → width ${count(wan.dim)}`),
      stage(`${wan.num_layers} blocks`, shape(shot.tokens, wan.dim),
        `${forwards} forwards: ${shot.steps} steps${shot.guidance === 1 ? '' : ', each with and without the prompt'}`,
        rules.length ? `injected: ${rules.map((rule) => `blocks ${ranges(Object.keys(rule.blocks).map(Number))}`).join('; ')}` : 'self-attention, attention to the text, feed-forward'),
      stage('Latent', shape(wan.out_dim, t, y, x), `${values} values per token, put back in place`),
      stage('Video', shape(3, shot.frames, shot.height, shot.width), `VAE, stride 4 × ${stride / 2} × ${stride / 2}; ${shot.fps} frames a second`)),
  );
  return root;
}

// The branches of each step: at guidance 1 there is no forward without the prompt.
function stepsOf(shot) {
  const found = [];
  for (const part of shot.stages) {
    for (let step = part.steps[0]; step <= part.steps[1]; step += 1) found[step] = shot.negative && part.guidance !== 1 ? ['cond', 'uncond'] : ['cond'];
  }
  return found;
}
