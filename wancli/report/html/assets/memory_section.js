// Memory: predicted beside measured, and what other settings would take.

const UNKNOWN_PROMPT_TOKENS = 100; // of a prompt that is not written yet

function settingsOf(shot) {
  const model = modelOf(shot);
  const tokens = shot.prompts ? shot.prompts.map((index) => data.prompts[index].tokens) : [UNKNOWN_PROMPT_TOKENS, UNKNOWN_PROMPT_TOKENS];
  const measured = shot.effects ? 2 : 1;
  return {
    device: model.device, dtype: model.dtype, residency: model.residency, encoder: model.text_encoder, chunk: model.chunk,
    width: shot.width, height: shot.height, frames: shot.frames, tokens,
    forwards: (shot.prompts && !shot.negative ? 1 : 2) * measured,
    decodeChunk: shot.decode_chunk,
    loras: [...new Map((shot.loras ?? []).map((lora) => [lora.path, lora.bytes ?? 0])).values()].reduce((a, b) => a + b, 0),
  };
}

function drawMemory(shot) {
  const root = body('memory');
  root.replaceChildren();
  if (!hasManifest(shot)) return root.append(noManifest(shot));
  const columns = h('div', { class: 'cols' });
  root.append(columns);
  if (shot.predicted !== undefined) columns.append(measuredMemory(shot));
  const { calculator } = modelOf(shot);
  if (calculator) columns.append(memoryCalculator(shot, calculator));
  else columns.append(muted('The manifest is of an earlier wancli and does not say how the networks are stored, so other settings cannot be computed here. Use wancli plan JOB --memory SIZE.'));
  return root;
}

function measuredMemory(shot) {
  const measured = (name) => Math.max(0, ...data.phases[shot.phases].filter((phase) => phase.name === name).map((phase) => phase.cuda ?? phase.rss));
  const rows = data.predictions[shot.predicted].map((phase) => ({
    label: phase.name,
    parts: { process: phase.peak - phase.total, model: phase.model, activation: phase.activation, buffer: phase.buffer },
    peak: phase.peak,
    measured: measured(phase.name),
  }));
  return h('div', {}, h('h3', { style: { 'margin-top': '0' } }, `Predicted and measured, ${shot.id}`),
    stackedBars({ rows, title: 'Predicted memory per phase; a line marks the measured peak' }), partsLegend(true),
    table(['phase', 'model', 'activation', 'buffer', 'predicted', 'measured', 'off by'], rows.map((row) => [
      row.label, ...['model', 'activation', 'buffer'].map((part) => size(row.parts[part])), size(row.peak),
      row.measured ? size(row.measured) : '–', row.measured ? `${(100 * (row.measured / row.peak - 1)).toFixed(1)} %` : '–'])),
    muted(`Phases follow one another: the peak is that of the largest, not their sum. The process itself takes ${size(rows[0].parts.process)} in the prediction; a phase that had nothing to do stays below it, for example encoding if all prompts are cached. `, shot.sharing > 1 ? `Predicted for ${shot.sharing} shots that share each pass over the weights. ` : '',
      (modelOf(shot).why ?? []).join('. ')));
}

const partsLegend = (line) => h('div', { class: 'legend' }, ['process', 'model', 'activation', 'buffer'].map((name) => h('span', {}, h('span', { class: `swatch ${name}` }), ` ${name}`)), line ? h('span', {}, '│ measured') : null);

function memoryCalculator(shot, calculator) {
  const settings = settingsOf(shot);
  const out = h('div', { 'aria-live': 'polite' });
  const controls = h('form', { class: 'controls', on: { submit: (event) => event.preventDefault() } });
  const change = (key, read) => (value) => { settings[key] = read(value); update(); };
  const number = (key, label, step, least) => h('label', {}, label, h('input', {
    type: 'number', id: `set-${key}`, min: least, step, value: settings[key],
    on: { input: (event) => { const value = event.target.valueAsNumber; if (Number.isFinite(value) && event.target.validity.valid) { settings[key] = value; update(); } } },
  }));
  const limit = h('input', { type: 'number', id: 'set-limit', min: 0, step: 'any', placeholder: 'GiB', on: { input: () => update() } });
  const update = () => {
    if (settings.dtype === 'fp8') settings.residency = 'packed';
    const residency = controls.querySelector('#set-residency');
    residency.value = settings.residency;
    residency.disabled = settings.dtype === 'fp8';
    out.replaceChildren(...drawResult(calculator, settings, limit.valueAsNumber * 2 ** 30, update));
    if (!shot.prompts) applySettings(shot, calculator, settings);
  };
  controls.append(
    choice('Runs on', [['cpu', 'CPU'], ['cuda', 'CUDA']], settings.device, change('device', String), { id: 'set-device' }),
    choice('Precision', ['fp32', 'bf16', 'fp16', 'fp8'], settings.dtype, change('dtype', String), { id: 'set-dtype' }),
    choice('Weights', [['resident', 'resident'], ['packed', 'packed as stored'], ['streamed', 'streamed (offloaded)']], settings.residency, change('residency', String), { id: 'set-residency' }),
    choice('Text encoder', [['resident', 'resident'], ['packed', 'packed as stored'], ['streamed', 'streamed']], settings.encoder, change('encoder', String), { id: 'set-encoder' }),
    choice('Attention', [['', 'all tokens at once'], ...[...new Set([4096, 1024, settings.chunk].filter(Boolean))].map((n) => [n, `${count(n)} at a time`])], settings.chunk ?? '', change('chunk', (value) => (value ? Number(value) : null)), { id: 'set-chunk' }),
    number('width', 'Width', calculator.stride, calculator.stride), number('height', 'Height', calculator.stride, calculator.stride), number('frames', 'Frames', 4, 1),
    h('label', {}, 'Memory available', limit, 'GiB'),
    h('button', { type: 'button', on: { click: () => drawMemory(shot) } }, 'Reset'));
  update();
  return h('div', { id: 'calculator' }, h('h3', { style: { 'margin-top': '0' } }, 'What would it take?'), controls, out);
}

// If nothing was rendered, the rest of the page follows the settings.
function applySettings(shot, calculator, settings) {
  const { width, height, frames, dtype, device } = settings;
  if (shot.width === width && shot.height === height && shot.frames === frames && modelOf(shot).dtype === dtype && modelOf(shot).device === device) return;
  Object.assign(shot, { width, height, frames, tokens: tokensOf(calculator, settings) });
  Object.assign(modelOf(shot), { dtype, device });
  drawPipeline(shot);
  drawBlocks(shot);
}

function drawResult(calculator, settings, limit, update) {
  const phases = phasesOf(calculator, settings);
  const process = processOf(calculator, settings);
  const peak = process + Math.max(...phases.map((phase) => phase.total));
  const fits = limit > 0 ? h('strong', { class: peak <= limit ? 'good' : 'bad' }, peak <= limit ? ' fits' : ' does not fit') : null;
  const rows = phases.map((phase) => ({ label: phase.name, parts: { process, model: phase.model, activation: phase.activation, buffer: phase.buffer } }));
  return [
    h('p', {}, 'Peak ', h('strong', { id: 'peak', 'data-bytes': peak }, size(peak)), fits, `; ${count(tokensOf(calculator, settings))} tokens, computed in ${computeDtype(calculator, settings)} on ${settings.device === 'cpu' ? 'a CPU' : 'a GPU, of whose memory this is'}`),
    stackedBars({ rows, title: 'Memory of each phase with these settings' }), partsLegend(false),
    table(['phase', 'process', 'model', 'activation', 'buffer', 'total'], phases.map((phase) => [
      h('span', { 'data-phase': phase.name, 'data-model': phase.model, 'data-activation': phase.activation, 'data-buffer': phase.buffer }, phase.name),
      size(process), size(phase.model), size(phase.activation), size(phase.buffer), size(process + phase.total)]), { id: 'computed' }),
    alternatives(calculator, settings, limit, update),
    muted(`The text encoder is released before sampling, so it takes no memory from the video. The prompts have ${settings.tokens.join(' + ')} tokens. fp8 is half of bf16, not a quarter; nothing grows with tokens × tokens, because attention runs fused.`),
  ];
}

// Precision × residency × attention at this size: the peak while the transformer is loaded.
function alternatives(calculator, settings, limit, update) {
  const chunks = [null, settings.chunk ?? 1024];
  const rows = ['fp32', 'bf16', 'fp16', 'fp8'].map((dtype) => [dtype, ...['resident', 'packed', 'streamed'].flatMap((residency) => chunks.map((chunk) => {
    if (dtype === 'fp8' && residency !== 'packed') return '';
    const phases = phasesOf(calculator, { ...settings, dtype, residency, chunk }).slice(1);
    const peak = processOf(calculator, settings) + Math.max(...phases.map((phase) => phase.total));
    const chosen = settings.dtype === dtype && settings.residency === residency && (settings.chunk ?? null) === chunk;
    const choose = () => {
      Object.assign(settings, { dtype, residency, chunk });
      for (const key of ['dtype', 'residency']) document.getElementById(`set-${key}`).value = settings[key];
      document.getElementById('set-chunk').value = chunk ?? '';
      update();
    };
    return { num: true, value: h('button', { type: 'button', class: `${limit > 0 ? (peak <= limit ? 'good' : 'bad') : ''} ${chosen ? 'chosen-option' : ''}`, title: `${dtype}, ${residency}, ${chunk ? `${count(chunk)} tokens at a time` : 'all tokens at once'}`, 'aria-pressed': chosen ? 'true' : 'false', on: { click: choose } }, size(peak)) };
  }))]);
  const head = ['', ...['resident', 'packed', 'streamed'].flatMap((residency) => chunks.map((chunk) => `${residency}${chunk ? `, ${count(chunk)}` : ''}`))];
  return h('details', {}, h('summary', {}, 'All combinations at this size'), table(head, rows, { class: 'alternatives' }));
}
