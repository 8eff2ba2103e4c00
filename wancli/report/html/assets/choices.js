// Stars and notes of shots. They stay in this browser, and the starred shots become a command.

const CHOICES = `wancli:${data.name}`;
const shotKey = (shot) => `${shot.job}/${shot.id}`;

function readChoices() {
  try { return JSON.parse(localStorage.getItem(CHOICES)) ?? {}; } catch { return {}; }
}

const choices = readChoices();

function keepChoice(shot, changes) {
  const one = { ...choices[shotKey(shot)], ...changes };
  if (one.star || one.note) choices[shotKey(shot)] = one;
  else delete choices[shotKey(shot)];
  try { localStorage.setItem(CHOICES, JSON.stringify(choices)); } catch { /* a browser that keeps nothing */ }
}

const isStarred = (shot) => Boolean(choices[shotKey(shot)]?.star);

function starButton(shot) {
  const on = isStarred(shot);
  return h('button', { type: 'button', class: 'star', 'data-star': data.shots.indexOf(shot), 'aria-pressed': String(on), 'aria-label': `Star ${shot.id}`, on: { click: (event) => {
    event.stopPropagation();
    keepChoice(shot, { star: !isStarred(shot) });
    showStars();
  } } }, on ? '★' : '☆');
}

function noteField(shot) {
  const field = h('input', { type: 'text', class: 'note-field', value: choices[shotKey(shot)]?.note ?? '', 'aria-label': `Note on ${shot.id}` });
  field.addEventListener('change', () => keepChoice(shot, { note: field.value }));
  field.addEventListener('click', (event) => event.stopPropagation());
  return field;
}

const quoted = (text) => (/^[\w.,@%+=:/-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

// Every star of the page as it is now, and the command that renders the starred shots larger.
function showStars() {
  for (const button of document.querySelectorAll('[data-star]')) {
    const on = isStarred(data.shots[button.dataset.star]);
    button.textContent = on ? '★' : '☆';
    button.setAttribute('aria-pressed', String(on));
  }
  const starred = data.shots.filter(isStarred);
  $('picked').hidden = !starred.length;
  const command = `wancli render ${quoted(`${starred[0]?.job ?? data.name}.yaml`)} --pick ${quoted(starred.map((shot) => shot.id).join(','))} -o finals/`;
  $('pick-command').textContent = command;
}
