// The videos arranged by the axes of a sweep, played together, with the difference from the baseline on top.

const wall = { rows: null, columns: null, heat: false, moving: false };

// The values that differ between shots: {name: shot -> value}
function axesOf(shots) {
  const names = [...new Set(shots.flatMap((shot) => Object.keys(shot.labels)))];
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
  const redraw = () => grid.replaceChildren(arrange(shots, axes));
  bar.append(...playback(grid));
  if (names.length) {
    bar.append(
      choice('Columns', [['', '–'], ...names], wall.columns, (value) => { wall.columns = value || null; redraw(); }, { id: 'columns' }),
      choice('Rows', [['', '–'], ...names], wall.rows, (value) => { wall.rows = value || null; redraw(); }, { id: 'rows' }));
  }
  if (strongest) {
    const box = h('input', { type: 'checkbox', id: 'heat', on: { change: () => { wall.heat = box.checked; for (const canvas of grid.querySelectorAll('canvas')) canvas.hidden = !wall.heat; } } });
    bar.append(h('label', {}, box, `difference from the baseline, full colour for ${percent(strongest, 0)}`));
  }
  root.replaceChildren(bar, grid,
    data.shots.some((shot) => shot.score) ? '' : muted('Scores and heat-maps against a baseline come with compare: true in the job, or wancli compare.'));
  redraw();
  return root;
}

function arrange(shots, axes) {
  const value = (axis, shot) => (axis ? String(axes[axis](shot) ?? '–') : '');
  const order = (axis) => [...new Set(shots.map((shot) => value(axis, shot)))].sort((a, b) => (Number.isFinite(Number(a) - Number(b)) ? a - b : 0));
  if (!wall.columns && !wall.rows) return h('div', { class: 'wall' }, h('div', { class: 'where' }, shots.map(card)));
  const columns = order(wall.columns);
  const rows = order(wall.rows);
  return h('div', { class: 'scroll' }, h('table', { class: 'wall-table' },
    h('thead', {}, h('tr', {}, h('td', {}), columns.map((column) => h('th', { scope: 'col' }, wall.columns ? `${wall.columns}: ${column}` : '')))),
    h('tbody', {}, rows.map((row) => h('tr', {}, h('th', { scope: 'row', class: 'wall-head' }, wall.rows ? `${wall.rows}: ${row}` : ''),
      columns.map((column) => h('td', {}, h('div', { class: 'where' },
        shots.filter((shot) => value(wall.columns, shot) === column && value(wall.rows, shot) === row).map(card)))))))));
}

const seen = 'IntersectionObserver' in window ? new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { entry.target.preload = 'auto'; seen.unobserve(entry.target); }
}, { rootMargin: '200px' }) : null;

function card(shot) {
  const index = data.shots.indexOf(shot);
  const { score } = shot;
  const video = h('video', { src: shot.video, poster: shot.poster, preload: shot.poster || seen ? 'none' : 'metadata', loop: true, playsinline: true, 'aria-label': `Video of ${shot.id}`, tabindex: -1 });
  video.muted = true;
  video.addEventListener('error', () => video.replaceWith(h('div', { class: 'none' }, 'video not found')));
  if (seen && !shot.poster) seen.observe(video);
  const small = (shot.width ?? 999) < 160;
  return h('article', { class: 'card', 'data-shot': index },
    h('div', { class: `frame${small ? ' small-pixels' : ''}`, style: { 'aspect-ratio': `${shot.width ?? 16} / ${shot.height ?? 9}` } }, video, score?.heatmap ? heatOver(score.heatmap) : null),
    picturesOf(shot).map((picture) => h('figure', { class: 'given' }, pictureOf(picture, 'frame'), h('figcaption', {}, `${picture.role}: ${picture.name}`))),
    h('footer', {}, h('button', { type: 'button', class: 'pick', on: { click: () => select(index) } }, shot.id),
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

// One clock for all videos: they follow the first.
function playback(grid) {
  const videos = () => [...grid.querySelectorAll('video')];
  const lead = () => videos().find((video) => video.duration > 0);
  const play = h('button', { type: 'button', id: 'play' }, 'Play all');
  const at = h('input', { type: 'range', id: 'scrub', min: 0, max: 1000, value: 0, 'aria-label': 'Position in all videos' });
  const follow = () => {
    const first = lead();
    if (!wall.moving || !first) return;
    at.value = (1000 * first.currentTime) / first.duration;
    for (const video of videos()) {
      if (video !== first && video.duration > 0 && Math.abs(video.currentTime - first.currentTime) > 0.15) video.currentTime = Math.min(first.currentTime, video.duration);
    }
  };
  const move = (on) => {
    wall.moving = on;
    play.textContent = on ? 'Pause all' : 'Play all';
    for (const video of videos()) {
      if (on) video.play().catch(() => {});
      else video.pause();
    }
  };
  play.addEventListener('click', () => move(!wall.moving));
  at.addEventListener('input', () => {
    move(false);
    for (const video of videos()) {
      const seek = () => { video.currentTime = (at.valueAsNumber / 1000) * Math.max(0, video.duration - 0.001); };
      if (video.duration > 0) seek();
      else { video.preload = 'auto'; video.addEventListener('loadedmetadata', seek, { once: true }); }
    }
  });
  setInterval(follow, 200);
  return [play, at];
}
