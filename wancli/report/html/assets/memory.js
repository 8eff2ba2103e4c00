// The formulas of wancli/memory.py and wancli/footprint.py, number for number; a test compares them.
// `of` is a model (document `calculator`), `asked` the settings:
// {dtype, residency, encoder, chunk, width, height, frames, tokens: [..], riders, decodeChunk, loras, fp8Matmul}
const FP32 = 4;
const LATENTS_KEPT = 6;
const ELEMENT = { fp32: 4, bf16: 2, fp16: 2 };

const processOf = (of) => (of.device === 'cpu' ? of.process : 0);
const computes = (of, asked) => (asked.dtype !== 'fp8' ? asked.dtype : of.device === 'cpu' ? 'fp32' : 'bf16');

function latentShape(of, asked) {
  const stride = of.stride / 2;
  return [of.channels, Math.floor((asked.frames - 1) / 4) + 1, Math.floor(asked.height / stride), Math.floor(asked.width / stride)];
}

function tokensOf(of, asked) {
  const [, t, y, x] = latentShape(of, asked);
  return t * Math.floor(y / 2) * Math.floor(x / 2);
}

function wanBytes(wan, element, blocks) {
  const matrices = 8 * wan.dim ** 2 + 2 * wan.dim * wan.ffn_dim;
  const biases = wan.num_layers * (9 * wan.dim + wan.ffn_dim);
  const others = wan.parameters - wan.num_layers * matrices - biases;
  return ((blocks ?? wan.num_layers) * matrices + biases) * element + others * FP32;
}

function fp8Bytes(wan) {
  const rows = 9 * wan.dim + wan.ffn_dim;
  return wan.num_layers * (8 * wan.dim ** 2 + 2 * wan.dim * wan.ffn_dim + FP32 * rows);
}

function t5Bytes(t5, element, streamed) {
  const matrices = 4 * t5.d_model * t5.d_kv * t5.num_heads + 3 * t5.d_model * t5.d_ff;
  const gone = streamed ? t5.vocab_size * t5.d_model + (t5.num_layers - 2) * matrices : 0;
  return (t5.parameters - gone) * element;
}

const packed = (of, stored) => (of.device === 'cpu' ? stored.matrices : 0);
const scratch = (of, stored, residency) => (of.device === 'cuda' && residency !== 'resident' ? stored.largest : 0);

function encodePhase(of, asked) {
  const { t5 } = of;
  const dtype = asked.dtype === 'fp8' ? computes(of, asked) : asked.dtype;
  const element = ELEMENT[dtype];
  const inner = t5.d_kv * t5.num_heads;
  const tokens = Math.max(...asked.tokens);
  const prompts = asked.encoder === 'streamed' ? asked.tokens.length : 1;
  const scores = 3 * tokens ** 2 * t5.num_heads * FP32;
  let rows = tokens * (2 * t5.d_model + Math.max(4 * inner, 3 * t5.d_ff)) * element;
  rows += (prompts - 1) * tokens * t5.d_model * element;
  let weights = t5Bytes(t5, element, asked.encoder === 'streamed');
  if (asked.encoder === 'packed') {
    weights = t5Bytes(t5, element, true) + t5.vocab_size * t5.d_model * element + packed(of, of.stored.text_encoder);
  }
  if (dtype === 'fp16') weights += (asked.encoder === 'resident' ? t5.num_layers : 2) * t5.d_model * t5.d_ff * 2;
  return { name: 'encode', model: weights, activation: scores + rows, buffer: scratch(of, of.stored.text_encoder, asked.encoder) };
}

function sampleWeights(of, asked) {
  const { wan, stored } = of;
  const resident = asked.residency === 'resident';
  let weights = 0;
  if (asked.dtype === 'fp8') weights = stored.transformer.plain ? fp8Bytes(wan) : stored.transformer.matrices + stored.transformer.scales;
  else if (asked.residency === 'packed') weights = packed(of, stored.transformer);
  const blocks = resident && asked.dtype === 'fp8' ? 0 : resident ? null : 2;
  return weights + asked.loras + wanBytes(wan, ELEMENT[computes(of, asked)], blocks);
}

function samplePhase(of, asked) {
  const { wan, stored } = of;
  const element = ELEMENT[computes(of, asked)];
  const [channels, t, y, x] = latentShape(of, asked);
  const tokens = tokensOf(of, asked);
  const attention = 5 * wan.dim * element;
  const feedForward = (wan.ffn_dim + wan.dim) * element;
  const cast = element === FP32 ? 0 : wan.dim * element;
  let activation = tokens * (2 * wan.dim * FP32 + cast + Math.max(attention, feedForward));
  if (asked.chunk && asked.chunk < tokens) {
    const ofAll = wan.dim * FP32 + 2 * wan.dim * element;
    const ofChunk = wan.dim * FP32 + cast + Math.max(3 * wan.dim * element, feedForward);
    activation = Math.min(activation, tokens * ofAll + asked.chunk * ofChunk);
  }
  const rows = asked.tokens.reduce((sum, n) => sum + n + 1, 0);
  const keysValues = 2 * rows * wan.dim * wan.num_layers * element;
  const riders = asked.residency === 'resident' ? 1 : asked.riders;
  const rider = wan.dim * FP32 + wan.head_dim * FP32;
  let room = asked.dtype === 'fp8' ? 0 : scratch(of, stored.transformer, asked.residency);
  if (asked.loras && element !== FP32) room += Math.max(wan.dim, wan.ffn_dim) * wan.dim * FP32;
  return {
    name: 'sample',
    model: sampleWeights(of, asked),
    activation: activation + tokens * (riders - 1) * rider,
    buffer: keysValues + LATENTS_KEPT * channels * t * y * x * FP32 + room,
  };
}

function decodePhase(of, asked) {
  const { vae } = of;
  const [, t, y, x] = latentShape(of, asked);
  const frames = Math.min(4 * asked.decodeChunk, 4 * t - 3);
  const pixels = 64 * y * x;
  const weights = of.device === 'cpu' && vae.in_fp32 ? 2 * vae.decoder : vae.parameters;
  return {
    name: 'decode',
    model: sampleWeights(of, asked) + weights * FP32,
    activation: frames * pixels * (vae.widest * FP32 + vae.colours * (FP32 + 1)),
    buffer: Math.floor((2 * y * x * vae.history * FP32 * 18) / 16),
  };
}

const phasesOf = (of, asked) => [encodePhase(of, asked), samplePhase(of, asked), decodePhase(of, asked)]
  .map((phase) => ({ ...phase, total: phase.model + phase.activation + phase.buffer }));
