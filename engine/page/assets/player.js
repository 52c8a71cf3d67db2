// Goes through the steps of a trajectory: a slider with the buttons beside it.

const RUN_SECONDS = 12; // of a whole trajectory at speed 1
const ICONS = {
  play: "M7 4.5v15l13-7.5z",
  pause: "M6 5h4.5v14H6zM13.5 5H18v14h-4.5z",
  back: "M15.5 5v14L6 12z",
  forward: "M8.5 5v14L18 12z",
  start: "M18 5v14l-9-7zM6 5h2.5v14H6z",
};

// onstep(k) hears of every change: k steps are done, from 0 to numSteps. Gives the elements and go(k).
function player(numSteps, onstep) {
  let [done, speed, playing, began, from] = [0, 1, null, 0, 0];
  const icon = (name) => svg("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
  const button = (name, label, act) =>
    html("button", { type: "button", "aria-label": label, title: label, onclick: act }, icon(name));
  const slider = html("input.slider", {
    type: "range",
    min: 0,
    max: numSteps,
    step: 1,
    value: 0,
    "aria-label": "Steps done",
    oninput: () => {
      stop();
      go(Number(slider.value));
    },
  });
  const play = button("play", "Play", () => (playing ? stop() : start()));
  play.classList.add("play");

  function go(step) {
    done = Math.max(0, Math.min(numSteps, step));
    slider.value = done;
    slider.setAttribute("aria-valuetext", `step ${done} of ${numSteps}`);
    slider.style.setProperty("--done", `${(100 * done) / numSteps}%`);
    onstep(done);
  }
  function mark(name, label) {
    play.replaceChildren(icon(name));
    play.setAttribute("aria-label", label);
    play.title = label;
  }
  function start() {
    if (done === numSteps) go(0);
    [began, from] = [performance.now(), done];
    mark("pause", "Pause");
    playing = requestAnimationFrame(frame);
  }
  function stop() {
    if (playing) cancelAnimationFrame(playing);
    playing = null;
    mark("play", "Play");
  }
  function frame(now) {
    const next = Math.floor(from + (Math.max(0, now - began) / 1000) * speed * (numSteps / RUN_SECONDS));
    if (next > done) go(next);
    if (done === numSteps) return stop();
    playing = requestAnimationFrame(frame);
  }
  const by = (steps) => {
    stop();
    go(done + steps);
  };
  const onkeydown = (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches("select, [type=radio]")) return;
    const size = event.shiftKey ? 10 : 1;
    const acts = {
      ArrowRight: () => by(size),
      ArrowLeft: () => by(-size),
      Home: () => by(-numSteps),
      End: () => by(numSteps),
    };
    if (event.key === " " && event.target.tagName !== "BUTTON") acts[" "] = () => play.click();
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  };
  const buttons = html(
    "div.buttons",
    { role: "group", "aria-label": "Playback" },
    button("start", "To the start", () => by(-numSteps)),
    button("back", "One step back", () => by(-1)),
    play,
    button("forward", "One step on", () => by(1)),
  );
  const speeds = choice(
    "Speed",
    [
      ["0.25", "¼ ×"],
      ["0.5", "½ ×"],
      ["1", "1 ×"],
      ["2", "2 ×"],
      ["4", "4 ×"],
    ],
    "1",
    (value) => {
      [speed, began, from] = [Number(value), performance.now(), done];
    },
  );
  return { slider, buttons, speeds, onkeydown, go };
}
