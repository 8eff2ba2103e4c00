// Which shot is shown, the theme, and the first drawing.

let chosen = 0;

function select(index, { marks = true } = {}) {
  chosen = Math.max(0, Math.min(data.shots.length - 1, index));
  const shot = data.shots[chosen];
  $('shot').value = chosen;
  $('previous').disabled = chosen === 0;
  $('next').disabled = chosen === data.shots.length - 1;
  for (const element of document.querySelectorAll('[data-shot]')) element.classList.toggle('chosen', Number(element.dataset.shot) === chosen);
  if (marks && data.rendered) history.replaceState(null, '', `#shot=${encodeURIComponent(shot.id)}`);
  drawPipeline(shot);
  drawBlocks(shot);
  drawMemory(shot);
  if (data.rendered) {
    drawMaps(shot);
    drawAttention(shot);
    drawPrompts(shot);
    drawTime(shot);
    drawAgain(shot);
  }
}

// As in 2026-11-30 23:37 GMT+9: the zone is that of the reader.
const MINUTES = { year: 'numeric', month: '2-digit', day: '2-digit', hour: '2-digit', minute: '2-digit', timeZoneName: 'short' };

function summary() {
  const parts = [new Date(data.created).toLocaleString('sv-SE', MINUTES)];
  const counts = new Map();
  for (const shot of data.shots) counts.set(shot.status, (counts.get(shot.status) ?? 0) + 1);
  if (data.rendered) {
    parts.push([...counts].map(([status, n]) => `${n} ${status}`).join(', '));
    const peaks = data.jobs.map((job) => job.peak?.measured ?? 0);
    if (Math.max(0, ...peaks)) parts.push(`peak ${size(Math.max(...peaks))}`);
    const warnings = data.jobs.flatMap((job) => job.warnings ?? []);
    if (warnings.length) parts.push(`${pluralize(warnings.length, 'warning')}: ${warnings.join(' · ')}`);
  } else parts.push('no render: shapes, blocks and memory of models');
  $('summary').textContent = parts.join(' · ');
}

function theme() {
  const button = $('theme');
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  let on = dark.matches;
  const name = () => { button.textContent = on ? 'Light' : 'Dark'; };
  button.addEventListener('click', () => {
    on = !on;
    document.documentElement.style.setProperty('color-scheme', on ? 'dark' : 'light');
    name();
  });
  dark.addEventListener('change', () => {
    on = dark.matches;
    document.documentElement.style.removeProperty('color-scheme');
    name();
  });
  name();
}

$('shot').append(...data.shots.map((shot, i) => h('option', { value: i }, data.jobs.length > 1 ? `${shot.job}: ${shot.id}` : shot.id)));
$('shot').addEventListener('change', (event) => select(Number(event.target.value)));
$('previous').addEventListener('click', () => select(chosen - 1));
$('next').addEventListener('click', () => select(chosen + 1));
let room = 0;
let drawnFor = document.documentElement.clientWidth;
window.addEventListener('resize', () => {
  cancelAnimationFrame(room);
  room = requestAnimationFrame(() => {
    const now = document.documentElement.clientWidth;
    if (now !== drawnFor && Math.min(now, drawnFor) < 640) select(chosen, { marks: false });
    drawnFor = now;
  });
});
theme();
summary();
prepareTable();
if (data.rendered) {
  drawVideos();
  showStars();
}
if (data.shots.length) select(data.chosen, { marks: false });

// `#shot=ID` chooses a shot; the address of a section opens it if it is folded. The sections have only now their heights.
function follow() {
  const [, id] = location.hash.match(/^#shot=(.*)$/) ?? [];
  if (id !== undefined) {
    const index = data.shots.findIndex((shot) => shot.id === decodeURIComponent(id));
    if (index >= 0) select(index, { marks: false });
  }
  const target = id === undefined ? location.hash && $(location.hash.slice(1)) : $('blocks');
  if (!target) return;
  for (const folded of target.querySelectorAll('details.fold')) folded.open = true;
  target.scrollIntoView();
}
window.addEventListener('hashchange', follow);
follow();
