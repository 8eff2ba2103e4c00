// The table of shots in the page: sort by a column, filter by words, select a row.

function prepareTable() {
  const whole = $('experiments');
  if (!whole) return;
  const lines = [...whole.tBodies[0].rows];
  const counted = $('counted');
  const text = lines.map((line) => line.textContent.toLowerCase());
  const filter = () => {
    const words = $('filter').value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    lines.forEach((line, i) => {
      line.hidden = !words.every((word) => text[i].includes(word));
      shown += line.hidden ? 0 : 1;
    });
    counted.textContent = `${shown} of ${lines.length} shots`;
  };
  const valueOf = (line, key) => data.shots[line.dataset.shot].row[key];
  for (const head of whole.tHead.rows[0].cells) {
    head.querySelector('button').addEventListener('click', () => {
      const { key } = head.dataset;
      const down = head.getAttribute('aria-sort') === 'ascending';
      for (const other of whole.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const sorted = [...lines].sort((a, b) => compare(valueOf(a, key), valueOf(b, key)) * (down ? -1 : 1));
      whole.tBodies[0].append(...sorted);
    });
  }
  whole.tBodies[0].addEventListener('click', (event) => {
    const line = event.target.closest('tr');
    if (line) select(Number(line.dataset.shot));
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
