// Runs before the first paint (a plain blocking script: the content policy allows no inline code), so that a page
// whose theme was overridden never flashes in the other one. src/lib/theme.svelte.ts keeps the stored value.
(function () {
  try {
    var theme = localStorage.getItem('gale.theme');
    if (theme === 'light' || theme === 'dark') document.documentElement.dataset.theme = theme;
  } catch (_) {
    // Storage can be forbidden; the system's theme is then used.
  }
})();
