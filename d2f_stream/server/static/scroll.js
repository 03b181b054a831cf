/** Where the page is scrolled to: it follows an answer as long as its end is in sight. */

const NEAR_END_PX = 160;

/** @type {HTMLElement | null} */
let dock = null;

/** Whether the end of the page is in sight. */
export function isNearEnd() {
  const page = document.scrollingElement ?? document.documentElement;
  return page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_END_PX;
}

/** Do something, and stay at the end of the page where that was in sight. */
export function followEnd(act) {
  const follows = isNearEnd();
  act();
  if (follows) scrollToEnd();
}

export function scrollToEnd() {
  fitDock(); // a question that was sent leaves it lower, and what stands above it higher
  const page = document.scrollingElement ?? document.documentElement;
  page.scrollTop = page.scrollHeight;
}

/**
 * Tell the style sheet how high the dock is, so that a new question can move to the top; and show a
 * button that leads to the end while it is out of sight.
 */
export function watchDock(footer, toEnd) {
  dock = footer;
  new ResizeObserver(fitDock).observe(footer);
  const show = () => (toEnd.hidden = isNearEnd());
  addEventListener("scroll", show, { passive: true });
  new ResizeObserver(show).observe(document.body);
  toEnd.addEventListener("click", scrollToEnd);
}

function fitDock() {
  if (dock === null) return;
  document.documentElement.style.setProperty("--dock", `${dock.offsetHeight}px`);
}
