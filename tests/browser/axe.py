"""axe, which finds what some people could not use: https://github.com/dequelabs/axe-core"""

from browser.chromium import Axe, Page

# What can depend on a theme or on a width; all else is the same in each.
LOOK_RULES = ("color-contrast", "scrollable-region-focusable", "target-size", "aria-hidden-focus")
FIND = """async (rules) => {
    const runOnly = rules ?? undefined;
    const found = await axe.run(document, { resultTypes: ["violations"], runOnly });
    return found.violations.flatMap(({ id, nodes }) =>
        nodes.map(({ html, failureSummary }) => `${id}: ${html} ${failureSummary}`));
}"""


def faults(page: Page, rules: tuple[str, ...] | None = None) -> list[str]:
    """Return what axe finds wrong with the page as it is now; None stands for all its rules."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(Axe().axe_script)
    found: list[str] = page.evaluate(FIND, list(rules) if rules else None)
    return found
