// The table of shots in the page: sort by a column, filter by words, select a row.

const WINDOW = 200; // lines shown at first, and with every press of the button below

// The picture, star and note of a line, when it is shown for the first time.
function completeLine(line) {
  const shot = data.shots[line.dataset.shot];
  const [star] = line.getElementsByClassName('c-star');
  if (star.firstChild) return;
  star.append(starButton(shot));
  line.getElementsByClassName('c-note')[0].append(noteField(shot));
  const [link] = line.getElementsByClassName('thumb');
  if (link && shot.poster) link.replaceChildren(h('img', { src: shot.poster, alt: `Video of ${shot.id}` }));
}

function prepareTable() {
  const whole = $('experiments');
  if (!whole) return;
  const lines = [...whole.tBodies[0].rows];
  const counted = $('counted');
  const text = new Map(lines.map((line) => [line, line.textContent.toLowerCase()]));
  let order = lines;
  let most = WINDOW;
  const filter = () => {
    const words = $('filter').value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const line of order) {
      const matches = words.every((word) => text.get(line).includes(word));
      found += matches ? 1 : 0;
      line.hidden = !matches || found > most;
      if (!line.hidden) completeLine(line);
    }
    counted.textContent = `${found} of ${lines.length} shots`;
    $('more').hidden = found <= most;
    $('more').textContent = `Show ${count(Math.min(WINDOW, found - most))} more`;
  };
  $('more').addEventListener('click', () => { most += WINDOW; filter(); });
  const valueOf = (line, key) => (key === 'star' ? Number(!isStarred(data.shots[line.dataset.shot])) : data.shots[line.dataset.shot].row[key]);
  for (const head of whole.tHead.rows[0].cells) {
    head.querySelector('button').addEventListener('click', () => {
      const { key } = head.dataset;
      const down = head.getAttribute('aria-sort') === 'ascending';
      for (const other of whole.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      order = [...lines].sort((a, b) => compare(valueOf(a, key), valueOf(b, key)) * (down ? -1 : 1));
      whole.tBodies[0].append(...order);
      filter();
    });
  }
  whole.tBodies[0].addEventListener('click', (event) => {
    const line = event.target.closest('tr');
    if (line && !event.target.closest('a, input')) select(Number(line.dataset.shot));
  });
  $('filter').addEventListener('input', filter);
  $('all-columns').addEventListener('change', (event) => whole.classList.toggle('few', !event.target.checked));
  filter();
}

// Numbers by value, texts by letters, missing values last.
function compare(a, b) {
  if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
  return typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b), 'en', { numeric: true });
}
