// Where words act: heat over the video of a shot, by word, group of blocks, group of steps and frame.

const act = { word: 0, blocks: 0, steps: 0, frame: 0 };
const HEAT = [[0, 0, 0], [85, 15, 110], [185, 55, 85], [250, 140, 10], [252, 255, 165]]; // as in video/heat_overlay.py

function drawAttention(shot) {
  if (!data.attention) return;
  const root = body('attention');
  root.replaceChildren();
  const maps = shot.attention;
  if (!maps) return root.append(muted('This shot has no attention maps; attention: {words: [...]} in its job records them.'));
  const values = Uint8Array.from(atob(maps.values), (c) => c.charCodeAt(0));
  for (const name of ['blocks', 'steps']) act[name] = Math.min(act[name], maps[name].length - 1);
  act.word = Math.min(act.word, maps.words.length - 1);
  act.frame = Math.min(act.frame, shot.frames - 1);
  const canvas = h('canvas', { width: shot.width, height: shot.height, role: 'img' });
  const video = shot.video ? h('video', { src: shot.video, preload: 'auto', playsinline: true, tabindex: -1, 'aria-hidden': 'true' }) : null;
  const said = h('output', {});
  const draw = () => {
    const rate = Number(String(shot.fps).split('/').reduce((a, b) => a / b));
    if (video) video.currentTime = (act.frame + 0.5) / rate;
    paintHeat(canvas, maps, values);
    said.textContent = `frame ${act.frame} of ${shot.frames}, full heat is ${figure(100 * maps.most[act.word])} %`;
    canvas.setAttribute('aria-label', `Attention to ${maps.words[act.word]}, ${said.textContent}`);
  };
  if (video) { video.muted = true; video.addEventListener('error', () => video.remove()); }
  const pick = (label, name, options) => choice(label, options.map((text, i) => [i, text]), act[name], (value) => { act[name] = Number(value); draw(); }, { id: `act-${name}` });
  const slider = h('input', { type: 'range', id: 'act-frame', min: 0, max: shot.frames - 1, value: act.frame, on: { input: () => { act.frame = Number(slider.value); draw(); } } });
  root.append(
    h('div', { class: 'controls noprint' }, pick('Word', 'word', maps.words), pick('Blocks', 'blocks', maps.blocks), pick('Steps', 'steps', maps.steps),
      h('label', {}, 'Frame', slider), said),
    h('div', { class: 'acting', style: { '--wide': `${Math.max(320, Math.min(960, shot.width))}px`, 'aspect-ratio': `${shot.width} / ${shot.height}` } }, video, canvas),
    muted('The probability that a block reads the word at each token of the video, in the mean over heads and over the blocks and steps of the group.'));
  draw();
  return root;
}

function paintHeat(canvas, maps, values) {
  const [frames, rows, columns] = maps.grid;
  const latent = Math.floor((act.frame + 3) / 4);
  const group = (act.word * maps.blocks.length + act.blocks) * maps.steps.length + act.steps;
  const start = (group * frames + latent) * rows * columns;
  const small = document.createElement('canvas');
  [small.width, small.height] = [columns, rows];
  const image = new ImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const place = (values[start + i] / 255) * (HEAT.length - 1);
    const low = Math.min(Math.floor(place), HEAT.length - 2);
    HEAT[low].forEach((ink, c) => { image.data[4 * i + c] = ink + (place - low) * (HEAT[low + 1][c] - ink); });
    image.data[4 * i + 3] = 255;
  }
  small.getContext('2d').putImageData(image, 0, 0);
  canvas.getContext('2d').drawImage(small, 0, 0, canvas.width, canvas.height);
}
