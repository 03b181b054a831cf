/** Light or dark: the system's choice, until the reader makes one. theme.js applies it on load. */

const KEY = "d2f.theme";

export function watchTheme($) {
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");

  const isDark = () => (root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";

  const show = () => {
    $("theme-label").textContent = isDark() ? "Switch to light" : "Switch to dark";
    const choice = root.dataset.theme ?? "system";
    for (const input of $("theme").querySelectorAll("input")) {
      input.checked = input.value === choice;
    }
  };

  const choose = (choice) => {
    if (choice === "system") delete root.dataset.theme;
    else root.dataset.theme = choice;
    try {
      localStorage.setItem(KEY, choice);
    } catch {
      // It holds for this page.
    }
    show();
  };

  $("toggle-theme").addEventListener("click", () => choose(isDark() ? "light" : "dark"));
  $("theme").addEventListener("change", (event) => choose(event.target.value));
  prefersDark.addEventListener("change", show);
  show();
}
