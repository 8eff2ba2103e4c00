// The videos arranged by the axes of a sweep, played together, with the difference from the baseline on top.

const NONE = '–'; // no such label
const wall = { rows: null, columns: null, only: {}, heat: false };

// The same order whatever wrote the page; the last two are rows and columns at first.
const seedFirst = (a, b) => (b === 'seed') - (a === 'seed') || a.localeCompare(b, 'en');

// The values that differ between shots: {name: shot -> value}
function axesOf(shots) {
  const names = [...new Set(shots.flatMap((shot) => Object.keys(shot.labels)))].sort(seedFirst);
  const found = Object.fromEntries(names.map((name) => [name, (shot) => shot.labels[name]]));
  for (const key of ['blocks', 'strength', 'seed', 'steps', 'prompt', 'injected', 'job']) {
    if (!(key in found)) found[key] = (shot) => shot.row[key];
  }
  if (!('image' in found)) found.image = (shot) => picturesOf(shot)[0]?.name;
  const different = (of) => new Set(shots.map((shot) => String(of(shot) ?? '–'))).size;
  return Object.fromEntries(Object.entries(found).filter(([, of]) => different(of) > 1));
}

// The largest difference, 0 to 1, which is drawn in full colour.
const strongest = Math.max(0, ...data.shots.flatMap((shot) => shot.score?.heatmap?.values ?? []));

function drawVideos() {
  const root = body('videos');
  const shots = data.shots.filter((shot) => shot.video);
  if (!shots.length) return root.append(muted('No videos found.'));
  const axes = axesOf(shots);
  const names = Object.keys(axes);
  const swept = names.filter((name) => shots.some((shot) => name in shot.labels));
  [wall.columns, wall.rows] = [swept.at(-1) ?? null, swept.at(-2) ?? null];
  const grid = h('div', {});
  const bar = h('div', { class: 'controls noprint' });
  const redraw = () => {
    bar.replaceChildren(...selectors(shots, axes, redraw), ...heatBox(grid), ...data.comparisons.map((file) => h('a', { href: file.href }, file.name)));
    grid.replaceChildren(arrange(shots.filter((shot) => isShown(shot, axes)), axes));
  };
  root.replaceChildren(playback(grid, Math.max(...shots.map((shot) => shot.frames ?? 1))), bar, grid,
    data.shots.some((shot) => shot.score) ? '' : muted('Scores and heat-maps against a baseline come with compare: true in the job, or wancli compare.'));
  redraw();
  return root;
}

// Which axis goes down, which across, and for each other axis of the sweep which values are shown.
function selectors(shots, axes, redraw) {
  const names = Object.keys(axes);
  if (!names.length) return [];
  const axis = (label, key, other) => choice(label, [['', '–'], ...names.filter((name) => name !== wall[other])], wall[key] ?? '', (value) => { wall[key] = value || null; delete wall.only[value]; redraw(); }, { id: key });
  const further = names.filter((name) => name !== wall.rows && name !== wall.columns && shots.some((shot) => name in shot.labels));
  return [axis('Rows', 'rows', 'columns'), axis('Columns', 'columns', 'rows'),
    ...further.map((name) => choice(name, [['', 'all'], ...valuesOf(shots, axes[name])], wall.only[name] ?? '', (value) => { wall.only[name] = value; redraw(); }, { id: `only-${name}` }))];
}

const valuesOf = (shots, of) => [...new Set(shots.map(of).filter((value) => value !== undefined).map(String))]
  .sort((a, b) => (Number.isFinite(Number(a) - Number(b)) ? a - b : 0));

// A plain shot lacks some labels, and is shown beside all of their values.
const isShown = (shot, axes) => Object.entries(wall.only).every(([name, value]) => !value || name === wall.rows || name === wall.columns || [undefined, value].includes(axes[name](shot)?.toString()));

function heatBox(grid) {
  if (!strongest) return [];
  const box = h('input', { type: 'checkbox', id: 'heat', checked: wall.heat, on: { change: () => { wall.heat = box.checked; for (const canvas of grid.querySelectorAll('canvas')) canvas.hidden = !wall.heat; } } });
  return [h('label', {}, box, `difference from the baseline, full colour for ${percent(strongest, 0)}`)];
}

function arrange(shots, axes) {
  const value = (axis, shot) => (axis ? String(axes[axis](shot) ?? NONE) : '');
  const order = (axis) => [...new Set(shots.map((shot) => value(axis, shot)))].sort((a, b) => (b === NONE) - (a === NONE) || (Number.isFinite(Number(a) - Number(b)) ? a - b : 0));
  if (!wall.columns && !wall.rows) return h('div', { class: 'wall' }, h('div', { class: 'where' }, shots.map(card)));
  // A shot with neither label, as a plain one, begins its row and needs no column of its own.
  const lone = (shot) => wall.rows && value(wall.rows, shot) === NONE && value(wall.columns, shot) === NONE;
  const columns = order(wall.columns).filter((column) => column !== NONE || shots.some((shot) => value(wall.columns, shot) === NONE && !lone(shot)));
  if (!columns.length) columns.push(NONE);
  const columnOf = (shot) => (lone(shot) ? columns[0] : value(wall.columns, shot));
  const cells = Map.groupBy(shots, (shot) => JSON.stringify([value(wall.rows, shot), columnOf(shot)]));
  const rows = order(wall.rows);
  return h('div', { class: 'scroll' }, h('table', { class: 'wall-table', style: { '--columns': columns.length } },
    h('thead', {}, h('tr', {}, h('td', {}), columns.map((column) => h('th', { scope: 'col' }, headingOf(wall.columns, column))))),
    h('tbody', {}, rows.map((row) => h('tr', {}, h('th', { scope: 'row', class: 'wall-head' }, headingOf(wall.rows, row)),
      columns.map((column) => h('td', {}, h('div', { class: 'where' },
        (cells.get(JSON.stringify([row, column])) ?? []).map(card)))))))));
}

function headingOf(axis, value) {
  if (!axis) return '';
  return value === NONE ? `without ${axis}` : `${axis}: ${value}`;
}

// Only frames near the window have a video: thousands of players at once would stop a browser.
const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const shot = data.shots[target.closest('[data-shot]').dataset.shot];
    if (!isIntersecting) target.replaceChildren();
    else if (!target.querySelector('video')) target.replaceChildren(...playerOf(shot));
  }
}, { rootMargin: '600px' });

// Paper shows all videos, by their posters.
window.addEventListener('beforeprint', () => {
  for (const frame of document.querySelectorAll('.card .frame:empty')) {
    const { poster } = data.shots[frame.closest('[data-shot]').dataset.shot];
    if (poster) frame.append(h('img', { src: poster, alt: '' }));
  }
});

function playerOf(shot) {
  const video = h('video', { src: shot.video, poster: shot.poster, preload: shot.poster ? 'none' : 'auto', loop: true, playsinline: true, 'aria-label': `Video of ${shot.id}`, tabindex: -1 });
  video.muted = true;
  video.addEventListener('error', () => video.replaceWith(h('div', { class: 'none' }, 'video not found')));
  joinPlayback(video);
  return [video, ...(shot.score?.heatmap ? [heatOver(shot.score.heatmap)] : [])];
}

function card(shot) {
  const index = data.shots.indexOf(shot);
  const { score } = shot;
  const small = (shot.width ?? 999) < 160;
  const frame = h('div', { class: `frame${small ? ' small-pixels' : ''}`, style: { 'aspect-ratio': `${shot.width ?? 16} / ${shot.height ?? 9}` } });
  near.observe(frame);
  return h('article', { class: `card${index === chosen ? ' chosen' : ''}`, 'data-shot': index },
    frame,
    picturesOf(shot).map((picture) => h('figure', { class: 'given' }, pictureOf(picture, 'frame'), h('figcaption', {}, `${picture.role}: ${picture.name}`))),
    h('footer', {}, starButton(shot), h('button', { type: 'button', class: 'pick', on: { click: () => select(index) } }, shot.id),
      h('p', {}, Object.entries(shot.labels).map(([name, value]) => `${name} ${value}`).join(', ') || (shot.row.blocks ? `blocks ${shot.row.blocks} at ${shot.row.strength}` : 'plain')),
      score && h('p', {}, scoreLine(score)),
      h('a', { href: shot.video }, 'open')));
}

function scoreLine(score) {
  if (score.baseline === score.id) return 'baseline';
  return score.baseline ? `${scoreText(score)}, beside ${score.baseline}` : `${scoreText(score)}; ${score.why.ssim}`;
}

const scoreText = (score) => [['Δ latent', score.latent_distance], ['PSNR', score.psnr], ['SSIM', score.ssim], ['motion', score.motion]]
  .filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => `${name} ${figure(value)}`).join(', ');

function heatOver({ width, height, values }) {
  const canvas = h('canvas', { width, height, 'aria-hidden': 'true' });
  canvas.hidden = !wall.heat;
  const context = canvas.getContext('2d');
  values.forEach((value, i) => {
    context.fillStyle = `rgb(255 70 0 / ${Math.min(0.9, value / strongest)})`;
    context.fillRect(i % width, Math.floor(i / width), 1, 1);
  });
  return canvas;
}
