// Memory of a shot: coefficients that Python emits (document `calculator`), evaluated. The formulas are in
// wancli/resources/memory_model.py, whose `phase()` methods these functions repeat; a test compares the results.
// `settings`: {device, dtype, residency, encoder, chunk, width, height, frames, tokens: [..], forwards,
// decodeChunk, loras}
const coefficientsOf = (calculator, settings) => calculator.devices[settings.device];
const processOf = (calculator, settings) => coefficientsOf(calculator, settings).process;
const computeDtype = (calculator, settings) => coefficientsOf(calculator, settings).compute_dtype[settings.dtype];

function latentGrid(calculator, settings) {
  const stride = calculator.stride / 2;
  return [Math.floor((settings.frames - 1) / 4) + 1, Math.floor(settings.height / stride), Math.floor(settings.width / stride)];
}

function tokensOf(calculator, settings) {
  const [t, y, x] = latentGrid(calculator, settings);
  return t * Math.floor(y / 2) * Math.floor(x / 2);
}

function encodePhase(c, settings) {
  const longest = Math.max(...settings.tokens);
  const further = (settings.tokens.length - 1) * c.per_further_token;
  return { name: 'encode', model: c.model, activation: longest * (longest * c.per_token_squared + c.per_token + further), buffer: c.buffer };
}

function samplePhase(c, settings, [t, y, x], tokens) {
  const whole = tokens * c.per_token;
  const chunked = tokens * c.per_token_in_chunks + settings.chunk * c.per_chunk_token;
  const further = settings.residency === 'resident' ? 0 : settings.forwards - 1;
  const rows = settings.tokens.reduce((sum, n) => sum + n + 1, 0);
  return {
    name: 'sample',
    model: c.model + settings.loras,
    activation: (settings.chunk ? Math.min(whole, chunked) : whole) + tokens * further * c.per_further_forward,
    buffer: rows * c.per_text_row + t * y * x * c.per_latent_cell + c.buffer + (settings.loras ? c.buffer_for_loras : 0),
  };
}

function decodePhase(c, settings, [t, y, x], resident) {
  const frames = Math.min(4 * settings.decodeChunk, 4 * t - 3);
  return { name: 'decode', model: c.model + resident, activation: frames * y * x * c.per_frame_cell, buffer: y * x * c.per_cell };
}

function phasesOf(calculator, settings) {
  const { encode, sample, decode } = coefficientsOf(calculator, settings);
  const grid = latentGrid(calculator, settings);
  const sampling = samplePhase(sample[settings.dtype][settings.residency], settings, grid, tokensOf(calculator, settings));
  return [
    encodePhase(encode[settings.dtype][settings.encoder], settings),
    sampling,
    decodePhase(decode, settings, grid, sampling.model),
  ].map((phase) => ({ ...phase, total: phase.model + phase.activation + phase.buffer }));
}
