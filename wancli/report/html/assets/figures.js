// Charts as SVG, coloured by the style sheet: heat-maps, curves, bars, stacked bars.

// Charts keep the size of their letters, so they are drawn for the available width.
// A page that opens in a background tab has no width yet.
const fitWidth = (most) => Math.min(most, Math.max(240, document.documentElement.clientWidth - 64));

const shade = (share, ink = '--heat') => `color-mix(in oklab, var(${ink}) ${Math.round(100 * Math.min(1, Math.max(0, share)))}%, var(--paper))`;

const legend = (low, high, ink = '--heat', most = 1) => h('div', { class: 'legend' }, low,
  h('span', { class: 'ramp', style: { background: `linear-gradient(to right, ${shade(0, ink)}, ${shade(most, ink)})` } }), high);

// For cells behind text: at most half as strong, so that the text can be read.
const tint = (share, ink) => shade(Math.min(1, share) / 2, ink);

// values[row][column], null for no value
function heatmap({ values, rows, columns, top, title, unit, ink = '--heat', name }) {
  const width = values[0].length;
  const widest = Math.max(18, ...columns.map((text) => 7 * String(text).length)); // named columns are as wide as their names
  const cell = Math.max(widest > 18 ? widest : 6, Math.min(18, Math.floor((fitWidth(580) - 46) / width)));
  const tall = Math.max(6, Math.min(18, Math.floor(420 / values.length)));
  const left = 46;
  const high = top ?? (Math.max(...values.flat().filter((v) => v !== null)) || 1);
  const every = Math.max(1, Math.ceil(values.length / 14));
  const marks = values.map((row, r) => row.map((value, c) => svg('rect', {
    x: left + c * cell, y: 16 + r * tall, width: cell - 1, height: tall - 1,
    style: { fill: value === null ? 'var(--paper)' : shade(value / high, ink) },
  }, svg('title', {}, `${name(r, c)}: ${value === null ? 'none' : unit(value)}`))));
  const side = rows.map((text, r) => (r % every ? null : svg('text', { x: left - 6, y: 16 + r * tall + tall / 2 + 4, 'text-anchor': 'end' }, text)));
  const above = columns.map((text, c) => (c % 5 && text === c ? null : svg('text', { x: left + c * cell + cell / 2, y: 11, 'text-anchor': 'middle' }, text)));
  const size = [left + width * cell, 16 + values.length * tall];
  return h('figure', { style: { margin: '0' } },
    h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': title },
      svg('svg', { viewBox: `0 0 ${size[0]} ${size[1]}`, width: size[0], role: 'img', 'aria-label': title }, marks, side, above)),
    legend('0', unit(high), ink));
}

// lines: [{points: [[x, y]], class, label}]; y from 0 to top
function curves({ lines, top, xLabel, yLabel, title, half, width = fitWidth(520), height = 200 }) {
  const [left, right, up, down] = [44, 10, 10, 30];
  const last = Math.max(1, ...lines.flatMap((line) => line.points.map(([x]) => x)));
  const x = (value) => left + (value / last) * (width - left - right);
  const y = (value) => height - down - (value / top) * (height - up - down);
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => share * top);
  const every = Math.max(1, Math.round(last / 10));
  const marks = Array.from({ length: Math.floor(last / every) + 1 }, (_, i) => i * every);
  return svg('svg', { viewBox: `0 0 ${width} ${height}`, width, role: 'img', 'aria-label': title },
    ticks.map((tick) => [svg('line', { class: 'rule', x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      svg('text', { x: left - 6, y: y(tick) + 4, 'text-anchor': 'end' }, figure(tick))]),
    marks.map((mark) => svg('text', { x: x(mark), y: height - down + 14, 'text-anchor': 'middle' }, mark)),
    svg('text', { x: width - right, y: height - 3, 'text-anchor': 'end' }, xLabel),
    svg('text', { x: width - right, y: up + 14, 'text-anchor': 'end' }, yLabel),
    half === undefined ? null : svg('line', { class: 'half', x1: left, x2: width - right, y1: y(half), y2: y(half) }),
    lines.map((line) => [svg('polyline', { class: `curve ${line.class ?? ''}`, points: line.points.map(([a, b]) => `${x(a)},${y(b)}`).join(' ') }),
      line.points.map(([a, b]) => svg('circle', { class: `dot ${line.class ?? ''}`, cx: x(a), cy: y(b), r: 2.2 }, svg('title', {}, `${line.label} ${a}: ${figure(b)}`)))]));
}

// One bar per block; `half` draws the 50 % line
function bars({ values, top, title, unit, half, ink = '--accent' }) {
  const cell = Math.max(6, Math.min(16, Math.floor((fitWidth(570) - 42) / values.length)));
  const [left, height] = [42, 90];
  const y = (value) => 6 + height - (Math.min(value, top) / top) * height;
  return h('div', { class: 'scroll' }, svg('svg', { viewBox: `0 0 ${left + values.length * cell} ${height + 26}`, width: left + values.length * cell, role: 'img', 'aria-label': title },
    [0, 0.5, 1].map((share) => [svg('line', { class: 'rule', x1: left, x2: left + values.length * cell, y1: y(share * top), y2: y(share * top) }),
      svg('text', { x: left - 5, y: y(share * top) + 4, 'text-anchor': 'end' }, unit(share * top))]),
    values.map((value, i) => svg('rect', { x: left + i * cell, y: y(value), width: cell - 1.5, height: 6 + height - y(value), style: { fill: shade(0.6, ink) } }, svg('title', {}, `block ${i}: ${unit(value)}`))),
    half === undefined ? null : svg('line', { class: 'half', x1: left, x2: left + values.length * cell, y1: y(half), y2: y(half) }),
    values.map((_, i) => (i % 5 ? null : svg('text', { x: left + i * cell + cell / 2, y: height + 20, 'text-anchor': 'middle' }, i)))));
}

// rows: [{label, parts: {model, activation, buffer, process}, measured}]
function stackedBars({ rows, title, width = fitWidth(560) }) {
  const [left, tall, gap, right] = [64, 20, 12, 78];
  const total = (row) => Object.values(row.parts).reduce((a, b) => a + b, 0);
  const most = Math.max(1, ...rows.map((row) => Math.max(total(row), row.measured ?? 0)));
  const x = (bytes) => (bytes / most) * (width - left - right);
  return svg('svg', { viewBox: `0 0 ${width} ${rows.length * (tall + gap)}`, width, role: 'img', 'aria-label': title },
    rows.map((row, r) => {
      let at = left;
      const top = r * (tall + gap) + gap / 2;
      const segments = Object.entries(row.parts).map(([name, bytes]) => {
        const bar = svg('rect', { class: name, x: at, y: top, width: x(bytes), height: tall }, svg('title', {}, `${row.label}, ${name}: ${size(bytes)}`));
        at += x(bytes);
        return bar;
      });
      return [svg('text', { x: left - 6, y: top + 14, 'text-anchor': 'end' }, row.label), segments,
        row.measured ? svg('line', { class: 'measured', x1: left + x(row.measured), x2: left + x(row.measured), y1: top - 3, y2: top + tall + 3 }, svg('title', {}, `${row.label}, measured: ${size(row.measured)}`)) : null,
        svg('text', { x: Math.max(at, left + x(row.measured ?? 0)) + 6, y: top + 14 }, size(total(row)))];
    }));
}
