// The document, helpers that create elements, and formats of numbers. Text of jobs only ever becomes text nodes.
const data = JSON.parse(document.getElementById('data').textContent);
const SVG = 'http://www.w3.org/2000/svg';

const $ = (id) => document.getElementById(id);
const body = (id) => document.querySelector(`#${id} .body`);

function fill(element, props, children) {
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key === 'on') for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
    else if (key === 'style') for (const [name, v] of Object.entries(value)) element.style.setProperty(name, v);
    else element.setAttribute(key, value === true ? '' : value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
const svg = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);

function table(head, rows, props = {}) {
  const cells = (row, tag) => row.map((cell, i) => {
    const value = cell?.value ?? cell;
    const num = typeof value === 'string' && i > 0 && /^[-−+]?[\d.,]+( ?[%×]| ?[KMGT]?i?B| [kMGTP]?FLOP| m?s)?$/.test(value);
    return i === 0 && tag === 'td' ? h('th', { scope: 'row' }, value) : h(tag, { class: num || cell?.num ? 'num' : typeof value === 'string' && value.length < 12 ? 'tight' : null, scope: tag === 'th' ? 'col' : null }, value);
  });
  return h('div', { class: 'scroll' }, h('table', props,
    head ? h('thead', {}, h('tr', {}, cells(head, 'th'))) : null,
    h('tbody', {}, rows.map((row) => h('tr', {}, cells(row, 'td'))))));
}

const facts = (pairs) => h('dl', { class: 'facts' },
  pairs.filter(([, value]) => value !== null && value !== undefined && value !== '')
    .map(([name, value]) => [h('dt', {}, name), h('dd', {}, value)]));

const muted = (...children) => h('p', { class: 'muted' }, ...children);

const count = (n) => Number(n).toLocaleString('en-US', { maximumFractionDigits: 0 });
const pluralize = (n, what) => `${count(n)} ${what}${n === 1 ? '' : 's'}`;
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const figure = (x) => (x === 0 ? '0' : Math.abs(x) >= 1000 ? count(x) : String(Number(x.toPrecision(3))));

// As in wancli/units.py, except for times below a second.
function size(bytes) {
  for (const unit of ['B', 'KiB', 'MiB']) {
    if (bytes < 1024) return `${bytes.toFixed(0)} ${unit}`;
    bytes /= 1024;
  }
  return `${bytes.toFixed(1)} GiB`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return '?';
  if (seconds < 1) return `${(1000 * seconds).toFixed(0)} ms`;
  if (seconds < 120) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  return seconds < 7200 ? `${Math.floor(whole / 60)} min ${whole % 60} s` : `${(seconds / 3600).toFixed(1)} h`;
}

function flop(n) {
  for (const unit of ['', 'k', 'M', 'G', 'T']) {
    if (n < 1000) return `${n >= 100 || n === 0 ? n.toFixed(0) : n.toPrecision(3)} ${unit}FLOP`;
    n /= 1000;
  }
  return `${n.toPrecision(3)} PFLOP`;
}

// `0-3,7,10-39`
function ranges(numbers) {
  const parts = [];
  for (const n of [...numbers].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && n === last[1] + 1) last[1] = n;
    else parts.push([n, n]);
  }
  return parts.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(',');
}

function choice(label, options, value, change, props = {}) {
  const select = h('select', { ...props, on: { change: () => change(select.value) } },
    options.map((option) => {
      const [key, text] = Array.isArray(option) ? option : [option, option];
      return h('option', { value: key, selected: String(key) === String(value) }, text);
    }));
  return h('label', {}, label, select);
}

const modelOf = (shot) => data.models[shot.model];
const depthOf = (shot) => modelOf(shot).sizes.num_layers;
const rulesOf = (shot) => (shot.injection ?? []).map((use) => ({ ...use, ...data.rules[use.rule] }));
const hasManifest = (shot) => shot.model !== undefined;
// The block maps of a shot's network, and the index of a block in a map: alone, or as part of a range.
const mapsOf = (shot) => data.maps.filter((map) => map.model.sha256 === modelOf(shot).sha256?.transformer);
const methodOf = (map) => (map.attended === 'image' ? `${map.method} of pictures` : map.method);
const mapName = (map) => (data.maps.length > 1 ? `${map.job}, ${map.shot}: ${methodOf(map)}` : methodOf(map));
const indexIn = (map, block) => (map.ranges ? map.ranges.findIndex((range) => range.includes(block)) : block);
const noManifest = (shot) => muted(`This shot has no manifest: ${shot.status}.`, shot.error ? ` ${shot.error.message}` : '');
