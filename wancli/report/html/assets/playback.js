// One clock for all videos: they follow the first. The slider and the frame numbers move all of them.

const PLAYING = { on: false, at: 0 };

const videosIn = (grid) => [...grid.querySelectorAll('video')];
const seekTo = (video, share) => {
  const seek = () => { video.currentTime = share * Math.max(0, video.duration - 0.001); };
  if (video.duration > 0) seek();
  else { video.preload = 'auto'; video.addEventListener('loadedmetadata', seek, { once: true }); }
};

// A video that has just come into view joins the others.
function joinPlayback(video) {
  if (PLAYING.on) video.play().catch(() => {});
  if (PLAYING.at > 0) seekTo(video, PLAYING.at);
}

function playback(grid, frames) {
  const lead = () => videosIn(grid).find((video) => video.duration > 0);
  const play = h('button', { type: 'button', id: 'play' }, 'Play all');
  const at = h('input', { type: 'range', id: 'scrub', min: 0, max: 1000, value: 0, 'aria-label': 'Position in all videos' });
  const strip = frameStrip(frames, (share) => { at.value = 1000 * share; at.dispatchEvent(new Event('input')); });
  const follow = () => {
    const first = lead();
    if (!PLAYING.on || !first) return;
    PLAYING.at = first.currentTime / first.duration;
    at.value = 1000 * PLAYING.at;
    strip.mark(PLAYING.at);
    for (const video of videosIn(grid)) {
      if (video !== first && video.duration > 0 && Math.abs(video.currentTime - first.currentTime) > 0.15) video.currentTime = Math.min(first.currentTime, video.duration);
    }
  };
  const move = (on) => {
    PLAYING.on = on;
    play.textContent = on ? 'Pause all' : 'Play all';
    for (const video of videosIn(grid)) {
      if (on) video.play().catch(() => {});
      else video.pause();
    }
  };
  play.addEventListener('click', () => move(!PLAYING.on));
  at.addEventListener('input', () => {
    move(false);
    PLAYING.at = at.valueAsNumber / 1000;
    strip.mark(PLAYING.at);
    for (const video of videosIn(grid)) seekTo(video, PLAYING.at);
  });
  setInterval(follow, 200);
  return h('div', { class: 'playback noprint' }, play, h('div', { class: 'track' }, at, strip.element));
}

// Numbers of frames under the slider; dragging over them shows these frames.
function frameStrip(frames, show) {
  const count = Math.min(frames, 17);
  const numbers = [...Array(count).keys()].map((i) => Math.round((i * (frames - 1)) / Math.max(1, count - 1)));
  const marks = numbers.map((number) => h('span', {}, String(number)));
  const element = h('div', { class: 'frame-strip', id: 'frames', 'aria-hidden': 'true' }, marks);
  const drag = (event) => {
    if (event.type === 'pointermove' && !event.buttons) return;
    const { left, width } = element.getBoundingClientRect();
    show(Math.min(1, Math.max(0, (event.clientX - left) / width)));
  };
  element.addEventListener('pointerdown', (event) => { element.setPointerCapture(event.pointerId); drag(event); });
  element.addEventListener('pointermove', drag);
  const mark = (share) => {
    const now = Math.min(frames - 1, Math.floor(share * frames));
    marks.forEach((span, i) => span.classList.toggle('now', numbers[i] <= now && (numbers[i + 1] ?? frames) > now));
  };
  return { element, mark };
}
