// The blocks of the model, one cell each, and the details of the selected block.

const COLUMNS = 10;
const explorer = { block: null, colour: null }; // null until chosen

// The values that can colour the cells: {label, values, unit, ink}
function colourings(shot) {
  const depth = depthOf(shot);
  const rules = rulesOf(shot);
  const per = (get) => Array.from({ length: depth }, (_, block) => get(block));
  const found = {};
  if (shot.shares !== null && shot.shares !== undefined) {
    const rows = data.shares[shot.shares];
    found.injected = { label: 'injected share', values: per((b) => Math.max(...rows.map((row) => row.blocks[b]))), unit: (v) => percent(v, 0), top: 1, ink: '--accent' };
    found.hits = { label: 'hits', values: per((b) => rules.reduce((sum, rule) => sum + (rule.hits_by_block[b] ?? 0), 0)), unit: count, ink: '--accent' };
  }
  if (shot.effects) {
    const at = new Map(shot.effects.blocks.map((block, i) => [block, shot.effects.mean[i]]));
    found.effect = { label: 'measured effect', values: per((b) => at.get(b) ?? 0), unit: (v) => percent(v), ink: '--heat' };
  }
  if (rules.length && data.differences[rules[0].difference]?.blocks.length === depth) {
    found.difference = { label: 'K/V difference', values: data.differences[rules[0].difference].blocks, unit: (v) => percent(v), top: 1, ink: '--accent' };
  }
  mapsOf(shot).forEach((map, i) => {
    found[`map-${i}`] = { label: `map: ${mapName(map)}`, values: per((b) => map.total[indexIn(map, b)] ?? 0), unit: figure, ink: '--heat' };
  });
  return found;
}

function drawBlocks(shot) {
  const root = body('blocks');
  root.replaceChildren();
  if (!hasManifest(shot)) return root.append(noManifest(shot));
  const depth = depthOf(shot);
  const colours = colourings(shot);
  const colour = () => (explorer.colour in colours ? explorer.colour : Object.keys(colours)[0]);
  let current = Math.min(explorer.block ?? Math.max(0, colours.injected?.values.findIndex(Boolean) ?? 0), depth - 1);
  const grid = h('div', { class: 'grid', role: 'grid', 'aria-label': `${depth} blocks; arrow keys move` });
  const detail = h('div', { id: 'block', 'aria-live': 'polite' });
  const claims = h('div', { id: 'claims' });
  const key = h('div', {});
  const paint = () => paintCells(grid, key, colours[colour()]);
  const pick = (block, focus) => {
    current = block;
    for (const cell of grid.querySelectorAll('.cell')) {
      const chosen = Number(cell.dataset.block) === block;
      cell.setAttribute('aria-selected', chosen);
      cell.tabIndex = chosen ? 0 : -1;
      if (chosen && focus) cell.focus();
    }
    detail.replaceChildren(...blockDetail(shot, block));
    claims.replaceChildren(...claimsOf(shot, block));
  };
  const choose = (block, focus) => { explorer.block = block; pick(block, focus); };
  for (let start = 0; start < depth; start += COLUMNS) {
    grid.append(h('div', { role: 'row', style: { display: 'contents' } },
      Array.from({ length: Math.min(COLUMNS, depth - start) }, (_, i) => h('button', {
        type: 'button', class: 'cell', role: 'gridcell', 'data-block': start + i, on: { click: () => choose(start + i) },
      }, start + i))));
  }
  grid.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: COLUMNS, ArrowUp: -COLUMNS, Home: -current, End: depth - 1 - current }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const to = current + step;
    if (to >= 0 && to < depth) choose(to, true);
  });
  const options = Object.entries(colours).map(([name, { label }]) => [name, label]);
  root.append(h('div', { class: 'cols' },
    h('div', {},
      options.length > 0 && h('div', { class: 'controls' }, choice('Colour by', options, colour(), (value) => { explorer.colour = value; paint(); }, { id: 'colour' })),
      grid, key, wholeModel(shot), claims),
    detail));
  paint();
  pick(current, false);
  return root;
}

function paintCells(grid, key, colour) {
  const top = colour ? colour.top ?? (Math.max(...colour.values) || 1) : 1;
  for (const cell of grid.querySelectorAll('.cell')) {
    const block = Number(cell.dataset.block);
    const share = colour ? colour.values[block] / top : 0;
    cell.style.setProperty('background', tint(share, colour?.ink));
    cell.setAttribute('aria-label', colour ? `block ${block}, ${colour.label} ${colour.unit(colour.values[block])}` : `block ${block}`);
    cell.title = colour ? `${colour.label} ${colour.unit(colour.values[block])}` : '';
  }
  key.replaceChildren(...(colour ? [legend('0', colour.unit(top), colour.ink, 0.5)] : []));
}

const partFlops = (part, tokens, rows) => tokens * (part.flops.token + tokens * part.flops.token2 + rows * part.flops.token_text);

// Bytes of a part's weights: in the dtype of the model; beside fp8 matrices all else has two bytes.
function partBytes(part, dtype) {
  const element = { fp32: 4, bf16: 2, fp16: 2, fp8: 1 }[dtype];
  return part.matrices * element + (part.weights - part.matrices) * (dtype === 'fp8' ? 2 : element);
}

function textRows(shot) {
  return shot.prompts ? data.prompts[shot.prompts[0]].tokens + 1 : 257;
}

function blockDetail(shot, block) {
  const model = modelOf(shot);
  const rows = textRows(shot);
  const element = { fp32: 4, bf16: 2, fp16: 2, fp8: model.device === 'cpu' ? 4 : 2 }[model.dtype];
  const parts = model.parts.map((part) => ({
    name: part.name, weights: part.weights, bytes: partBytes(part, model.dtype), flops: partFlops(part, shot.tokens, rows), held: shot.tokens * part.values * element,
  }));
  const sum = (of) => parts.reduce((total, part) => total + part[of], 0);
  const all = sum('flops');
  return [
    h('h3', { style: { 'margin-top': '0' } }, `Block ${block}`),
    facts(blockFacts(shot, block)),
    table(['part', 'weights', `in ${model.dtype}`, 'FLOP per forward', 'share', 'working set'],
      [...parts.map((part) => [part.name, count(part.weights), size(part.bytes), flop(part.flops), percent(part.flops / all), size(part.held)]),
        ['the block', count(sum('weights')), size(sum('bytes')), flop(all), '100 %', { num: true, value: `${size(Math.max(...parts.map((part) => part.held)))} at once` }]], { id: 'parts' }),
    muted(`For ${count(shot.tokens)} video tokens and ${rows} text rows. Keys and values of the text are computed once per prompt: ${flop(rows * model.parts.reduce((total, part) => total + part.flops.text, 0))}, ${size(2 * rows * model.sizes.dim * element)} kept in each block.`),
    injectionOverSteps(shot, block),
    areasOfRules(shot, block),
  ].filter(Boolean);
}

function blockFacts(shot, block) {
  const rules = rulesOf(shot);
  const index = shot.effects ? shot.effects.blocks.indexOf(block) : -1;
  const differences = rules.map((rule) => data.differences[rule.difference]?.blocks[block]).filter((value) => value !== undefined);
  return [
    ['hits', rules.length ? rules.map((rule, i) => `${rules.length > 1 ? `rule ${i}: ` : ''}${count(rule.hits_by_block[block] ?? 0)}`).join('; ') : null],
    ['measured effect', index >= 0 ? `${percent(shot.effects.mean[index])} of its cross-attention output, mean over steps (|change| > 0.01 in ${shot.effects.legacy[index]} % of the elements)`
      : rules.length ? (shot.effects ? 'none here: no rule changes this block' : 'not measured; render with measure: true, or --log-level verbose') : null],
    ['K/V difference', differences.length ? differences.map((value) => percent(value)).join('; ') : null],
    ...mapsOf(shot).map((map) => [map, indexIn(map, block)]).filter(([, i]) => i >= 0)
      .map(([map, i]) => [`map: ${mapName(map)}`, `${figure(map.total[i])} ${map.unit}, ${rankOf(map.total, i)}${map.ranges ? `, as one of blocks ${ranges(map.ranges[i])}` : ''}`]),
  ];
}

function rankOf(values, block) {
  const rank = 1 + values.filter((value) => value > values[block]).length;
  return `rank ${rank} of ${values.length}`;
}

function injectionOverSteps(shot, block) {
  if (shot.shares === null || shot.shares === undefined) return null;
  const rows = data.shares[shot.shares];
  const steps = Array.from({ length: shot.steps }, (_, step) => step);
  const branches = [...new Set(rows.map((row) => row.branch))].filter((branch) => branch === 'cond' || rows.some((row) => row.branch === branch && row.blocks.some(Boolean)));
  const share = (branch, step) => rows.find((row) => row.branch === branch && row.steps.includes(step))?.blocks[block];
  const effects = shot.effects?.values ? shot.effects : null;
  const index = effects ? effects.blocks.indexOf(block) : -1;
  const effect = (branch, step) => {
    const at = effects.steps.findIndex((s, i) => s === step && effects.branches[i] === branch);
    return at < 0 ? null : effects.values[at][index];
  };
  const cell = (value, top, ink, text) => h('td', value ? { style: { background: tint(value / top, ink) } } : {}, text);
  const most = index >= 0 ? Math.max(...effects.values.map((row) => row[index] ?? 0)) || 1 : 1;
  return h('div', {},
    h('h3', {}, 'Injection over the steps'),
    h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': `Injection into block ${block} over the steps` }, h('table', { class: 'steps', id: 'over-steps' },
      h('tbody', {},
        h('tr', {}, h('th', { scope: 'row' }, 'step'), steps.map((step) => h('th', { scope: 'col' }, step))),
        h('tr', {}, h('th', { scope: 'row' }, 'σ'), steps.map((step) => h('td', {}, data.schedules[shot.schedule].sigmas[step].toFixed(2)))),
        branches.map((branch) => h('tr', {}, h('th', { scope: 'row' }, `${branch}, share`), steps.map((step) => {
          const value = share(branch, step);
          return cell(value, 1, '--accent', value === undefined ? '–' : value === 0 ? '·' : figure(value));
        }))),
        index >= 0 && branches.filter((branch) => effects.branches.includes(branch)).map((branch) => h('tr', {}, h('th', { scope: 'row' }, `${branch}, effect %`), steps.map((step) => {
          const value = effect(branch, step);
          return cell(value, most, '--heat', value === null ? '–' : figure(Math.round(100 * value)));
        })))))));
}

// The rules of a block that act in a part of the video: their latent frames, and their region over the poster.
function areasOfRules(shot, block) {
  const rules = rulesOf(shot).map((rule, i) => ({ ...rule, name: `inject.${i}` })).filter((rule) => rule.area && rule.blocks[block]);
  if (!rules.length) return null;
  const latent = Array.from({ length: (shot.frames - 1) / 4 + 1 }, (_, t) => (t === 0 ? [0, 0] : [4 * t - 3, 4 * t]));
  const inside = ([first, last], [from, to]) => Math.max(0, Math.min(to, last) - Math.max(from, first) + 1) / (last - first + 1);
  return h('div', { id: 'areas' },
    h('h3', {}, 'Injection over the frames'),
    h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': `Injection into block ${block} over the frames` }, h('table', { class: 'steps' },
      h('tbody', {},
        h('tr', {}, h('th', { scope: 'row' }, 'frames'), latent.map(([first, last]) => h('th', { scope: 'col' }, first === last ? first : `${first}-${last}`))),
        rules.map((rule) => h('tr', {}, h('th', { scope: 'row' }, rule.name), latent.map((frames) => {
          const value = rule.area.frames ? inside(frames, rule.area.frames) : 1;
          return h('td', value ? { style: { background: tint(value, '--accent') } } : {}, value === 0 ? '·' : figure(value));
        })))))),
    rules.map((rule) => h('p', {}, `${rule.name}: ${describeArea(rule.area)}: ${count(rule.area.tokens)} of ${count(shot.tokens)} tokens`)),
    rules.filter((rule) => rule.area.region || rule.area.white).map((rule) => areaOverFrame(shot, rule.area)));
}

function describeArea(area) {
  return [
    area.frames && `frames ${area.frames[0]}-${area.frames[1]}`,
    area.region && `region [${area.region.join(', ')}]`,
    area.mask && `mask ${area.mask}`,
    area.feather && `feather ${area.feather}`,
  ].filter(Boolean).join(', ');
}

// The region of a rule, or the tokens of its mask, over the poster.
function areaOverFrame(shot, area) {
  const width = 192;
  const height = width * shot.height / shot.width;
  return svg('svg', { width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': describeArea(area) },
    shot.poster ? svg('image', { href: shot.poster, width, height, preserveAspectRatio: 'none' })
      : svg('rect', { width, height, fill: 'var(--line)' }),
    area.region ? regionBox(area.region, width, height) : maskTokens(area.white, width, height));
}

function regionBox([left, top, right, bottom], width, height) {
  return svg('rect', { x: left * width, y: top * height, width: (right - left) * width, height: (bottom - top) * height,
    fill: 'var(--accent)', 'fill-opacity': 0.25, stroke: 'var(--accent)', 'stroke-width': 2 });
}

function maskTokens(rows, width, height) {
  const [high, wide] = [height / rows.length, width / rows[0].length];
  return rows.flatMap((row, y) => [...row].map((digit, x) => (digit === '0' ? null
    : svg('rect', { x: x * wide, y: y * high, width: wide, height: high, fill: 'var(--accent)', 'fill-opacity': 0.5 * digit / 9 })))).filter(Boolean);
}

function claimsOf(shot, block) {
  const model = modelOf(shot);
  const scaled = (block * 40) / depthOf(shot);
  const rows = data.claims.filter((claim) => !claim.model || claim.model === model.variant).flatMap((claim) => claim.ranges
    .filter(([range]) => { const [first, last] = range.split('-').map(Number); return first <= scaled && scaled < last + 1; })
    .map(([range, says]) => [says, range, `${claim.source}: ${claim.where}`]));
  return [
    h('h3', {}, 'What others say about this range'),
    muted('Presets are plain ranges. These claims contradict each other (texture early or structure early, meaning late or detail late), and only those for wan-mini come with a measurement.',
      depthOf(shot) === 40 ? '' : ` They are about 40 blocks; block ${block} of ${depthOf(shot)} corresponds to ${Math.floor(scaled)}.`,
      ' To measure this model with your prompts: wancli probe JOB.'),
    table(['said to make', 'of 40', 'source'], rows, { class: 'small' }),
  ];
}

function wholeModel(shot) {
  const model = modelOf(shot);
  const rows = textRows(shot);
  const depth = depthOf(shot);
  const total = (of, list) => list.reduce((sum, part) => sum + of(part), 0);
  const weights = (part) => part.weights;
  const flops = (part) => partFlops(part, shot.tokens, rows);
  const all = depth * total(weights, model.parts) + total(weights, model.ends);
  return h('div', {}, h('h3', {}, 'The whole transformer'), facts([
    ['parameters', `${count(all)}; ${percent((depth * total(weights, model.parts)) / all)} in ${depth} blocks`],
    ['FLOP per forward', flop(depth * total(flops, model.parts) + total(flops, model.ends))],
    ['width', `${count(model.sizes.dim)}, ${model.sizes.num_heads} heads of ${model.sizes.dim / model.sizes.num_heads}; feed-forward ${count(model.sizes.ffn_dim)}`],
  ]));
}
