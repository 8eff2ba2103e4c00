// The time of each phase, the noise levels, and the change of the velocity by an injection.

function drawTime(shot) {
  const root = body('time');
  root.replaceChildren();
  if (!hasManifest(shot)) return root.append(noManifest(shot));
  const phases = data.phases[shot.phases];
  const own = phases.reduce((sum, phase) => sum + phase.seconds, 0);
  const sampled = phases.filter((phase) => phase.name === 'sample');
  const perStep = sampled.reduce((sum, phase) => sum + phase.seconds / (phase.shots ?? 1), 0) / shot.steps;
  const { sigmas } = data.schedules[shot.schedule];
  const effects = shot.effects;
  root.append(h('div', { class: 'cols' },
    h('div', {}, h('h3', { style: { 'margin-top': '0' } }, `Phases of ${shot.id}`),
      table(['phase', 'time', 'share', 'for shots', 'memory peak'], phases.map((phase) => [phase.name, duration(phase.seconds), percent(phase.seconds / own), String(phase.shots ?? (phase.name === 'encode' || phase.name === 'load' ? 'the batch' : 1)), size(phase.cuda ?? phase.rss)])),
      facts([
        ['per step', `${duration(perStep)}, ${shot.negative ? 'both branches' : 'one forward'}, mean of ${shot.steps}`],
        ['first step after', `${duration(shot.first_step_after)} from the start of the process`],
        ['prompts', `${shot.cached.filter(Boolean).length} from the cache, ${shot.cached.filter((hit) => !hit).length} encoded; text encoder ${shot.encoder_loaded ? 'loaded' : 'never loaded'}`],
      ]),
      batchTime()),
    h('div', {}, h('h3', { style: { 'margin-top': '0' } }, `Noise levels: ${shot.solver}, ${shot.steps} steps, shift ${shot.shift}`),
      curves({ lines: [{ points: sigmas.map((sigma, i) => [i, sigma]), label: 'σ after step' }], top: 1, xLabel: 'step', yLabel: 'σ', title: 'Noise level over the steps' }),
      cacheStrip(shot),
      effects && [h('h3', {}, 'Change of the velocity by the injection'),
        curves({
          lines: [...new Set(effects.branches)].map((branch, i) => ({
            points: effects.steps.map((step, j) => [step, 100 * effects.velocity[j], effects.branches[j]]).filter(([, , of]) => of === branch),
            label: `${branch}, step`, class: i ? '' : 'second',
          })),
          top: 100 * Math.max(...effects.velocity), xLabel: 'step', yLabel: '%', title: 'Relative change of the velocity over the steps, percent',
        })])));
  return root;
}

// Which steps of each branch ran the blocks, and which reused the residual of an earlier one.
function cacheStrip(shot) {
  if (!shot.cache) return null;
  const { reused } = shot.cache;
  const steps = stepsOf(shot);
  const draw = (branch) => steps.map((ran, step) => (!ran.includes(branch) ? ' ' : reused[branch].includes(step) ? '·' : '█')).join('');
  const all = steps.reduce((sum, ran) => sum + ran.length, 0);
  const computed = all - Object.values(reused).reduce((sum, found) => sum + found.length, 0);
  return [h('h3', {}, `Step cache: ${computed} of ${all} forwards`),
    h('pre', { id: 'cache-strip' }, Object.keys(reused).map((branch) => `${branch.padEnd(7)}${draw(branch)}`).join('\n')),
    muted(`${shot.cache.method}, threshold ${shot.cache.threshold}, skips ${shot.cache.skips}, retention ${shot.cache.retention}, table ${shot.cache.table}. A dot is a step that reuses the residual of an earlier one.`)];
}

function batchTime() {
  if (!data.jobs.length) return null;
  return data.jobs.map((job) => h('div', {}, h('h3', {}, `All shots of ${job.job}`),
    job.memory?.length ? table(['phase', 'time', 'expected', 'measured peak'], job.memory.map((phase) => [phase.name, duration(phase.seconds), phase.expected === null || phase.expected === undefined ? '–' : duration(phase.expected), size(phase.measured)])) : muted('Nothing was rendered in the last run.'),
    job.cache ? muted(`Prompts in the last run: ${job.cache.hits} from the cache, ${job.cache.misses} encoded.`) : null));
}

function drawAgain(shot) {
  const root = body('again');
  root.replaceChildren();
  if (!hasManifest(shot)) return root.append(noManifest(shot));
  const model = modelOf(shot);
  const copy = h('button', { type: 'button', class: 'noprint', on: { click: async () => {
    await navigator.clipboard.writeText(shot.again);
    copy.textContent = 'Copied';
  } } }, 'Copy');
  root.append(h('div', { class: 'cols' },
    h('div', {}, h('h3', { style: { 'margin-top': '0' } }, 'The exact command'), copy, h('pre', { id: 'command', tabindex: 0 }, shot.again)),
    h('div', {}, h('h3', { style: { 'margin-top': '0' } }, 'Environment'), facts([
      ['video', shot.output], ['key', h('code', {}, shot.key)],
      ['model', model.root], ['runs', `${model.dtype} on ${model.device}, ${model.residency}${model.chunk ? `, ${count(model.chunk)} tokens at a time` : ''}`],
      ['attention', model.attention ? `${model.attention.self} among video tokens, ${model.attention.cross} to the text` : null],
      ...Object.entries(model.sha256 ?? {}).map(([name, digest]) => [`SHA-256 ${name.replace('_', ' ')}`, h('code', {}, digest)]),
      ...Object.entries(data.versions[shot.versions]).map(([name, version]) => [name, version]),
    ]))));
  return root;
}
