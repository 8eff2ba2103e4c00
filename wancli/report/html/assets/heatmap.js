// Block × step of one shot, as planned and as measured, and the block maps beside the outputs.

const mapping = { kind: null, map: 0 };

function drawMaps(shot) {
  const root = body('maps');
  root.replaceChildren();
  const views = hasManifest(shot) ? viewsOf(shot) : {};
  const maps = hasManifest(shot) ? mapsOf(shot) : [];
  if (!Object.keys(views).length && !maps.length) {
    return root.append(muted('No rule of this shot injects anything, and there is no block map beside the outputs. wancli probe JOB measures one: which block does what for these prompts.'));
  }
  const columns = h('div', { class: 'cols' });
  root.append(columns);
  if (Object.keys(views).length) columns.append(viewOf(shot, views));
  if (maps.length) columns.append(mapOf(maps));
  else columns.append(h('div', {}, h('h3', { style: { 'margin-top': '0' } }, 'Block map'), muted('There is no block map beside the outputs. wancli probe JOB measures one.')));
  return root;
}

function viewsOf(shot) {
  const found = {};
  const depth = depthOf(shot);
  if (shot.shares !== null && shot.shares !== undefined) {
    for (const branch of new Set(data.shares[shot.shares].filter((row) => row.blocks.some(Boolean)).map((row) => row.branch))) {
      const values = Array.from({ length: shot.steps }, () => Array(depth).fill(null));
      for (const row of data.shares[shot.shares]) if (row.branch === branch) for (const step of row.steps) values[step] = row.blocks;
      found[`${branch}, injected share`] = { values, ink: '--accent', top: 1, unit: (v) => percent(v, 0) };
    }
  }
  if (shot.effects?.values) {
    for (const branch of new Set(shot.effects.branches)) {
      const values = Array.from({ length: shot.steps }, () => Array(depth).fill(null));
      shot.effects.steps.forEach((step, i) => {
        if (shot.effects.branches[i] === branch) shot.effects.blocks.forEach((block, j) => { values[step][block] = shot.effects.values[i][j]; });
      });
      found[`${branch}, measured effect`] = { values, ink: '--heat', unit: (v) => percent(v) };
    }
  }
  return found;
}

function viewOf(shot, views) {
  const names = Object.keys(views);
  if (!names.includes(mapping.kind)) mapping.kind = names.find((name) => name.endsWith('effect')) ?? names[0];
  const slot = h('div', {});
  const draw = () => {
    const view = views[mapping.kind];
    slot.replaceChildren(heatmap({
      ...view,
      rows: view.values.map((_, step) => step),
      columns: view.values[0].map((_, block) => block),
      title: `${mapping.kind}: a row per step, a column per block`,
      name: (step, block) => `step ${step}, block ${block}`,
    }));
  };
  draw();
  return h('div', {}, h('h3', { style: { 'margin-top': '0' } }, `Steps × blocks of ${shot.id}`),
    h('div', { class: 'controls' }, choice('Show', names, mapping.kind, (value) => { mapping.kind = value; draw(); })),
    slot,
    muted('Effect: ‖CA(injected) − CA(plain)‖ / ‖CA(plain)‖ of each block’s cross-attention.', shot.effects && !shot.effects.values ? ' This page has too many shots to include it per step.' : ''));
}

function mapOf(maps) {
  const slot = h('div', {});
  mapping.map = Math.min(mapping.map, maps.length - 1);
  const draw = () => {
    const map = maps[mapping.map];
    const names = map.ranges ? map.ranges.map(ranges) : map.total.map((_, block) => block);
    const levels = map.levels.map((level) => `σ ${level.sigma.toFixed(2)}`);
    const total = levels.length === 0 ? ['video'] : levels.length > 1 ? ['mean'] : [];
    const parts = Object.entries(map.parts ?? {});
    const rows = [...levels, ...total, ...parts.map(([name]) => name)];
    slot.replaceChildren(
      heatmap({
        values: [...map.values, ...(total.length ? [map.total] : []), ...parts.map(([, values]) => values)],
        rows,
        columns: names,
        title: `Block map by ${methodOf(map)}: a row per noise level, a column per block`,
        name: (level, block) => `${rows[level]}, ${map.ranges ? 'blocks' : 'block'} ${names[block]}`,
        unit: figure,
      }),
      facts([
        ['suggestion', h('code', {}, `blocks: ${map.suggestion}`)],
        ['unit', map.unit],
        [map.attended === 'image' ? 'pictures' : 'prompts', map.prompts.map((pair) => `${pair.main} ⇐ ${pair.injected}`).join(' · ')],
        ['measured', `${map.size}, ${pluralize(map.frames, 'frame')}, seed ${map.seed}, ${figure(map.forwards)} forwards, ${duration(map.seconds)}`],
        ['model', map.model.root],
      ]));
  };
  draw();
  const names = maps.map((map, i) => [i, mapName(map)]);
  return h('div', { id: 'map' }, h('h3', { style: { 'margin-top': '0' } }, 'Block map'),
    h('div', { class: 'controls' }, choice('Map', names, mapping.map, (value) => { mapping.map = Number(value); draw(); })), slot);
}
