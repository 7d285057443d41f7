import { readSetting, writeSetting } from './settings';

export type Theme = 'light' | 'dark';

const KEY = 'gale.theme';

/**
 * Light or dark. The system decides unless the reader chose the other one: choosing what the system has anyway
 * drops the override, so a single button both overrides and returns to following the system.
 * `public/theme.js` applies the stored value before the first paint.
 */
class ThemeState {
  #media = window.matchMedia('(prefers-color-scheme: dark)');
  #system = $state<Theme>('light');
  #override = $state<Theme | null>(null);
  current = $derived(this.#override ?? this.#system);

  constructor() {
    const stored = readSetting(KEY);
    if (stored === 'light' || stored === 'dark') this.#override = stored;
    const follow = () => (this.#system = this.#media.matches ? 'dark' : 'light');
    follow();
    this.#media.addEventListener('change', follow);
  }

  toggle(): void {
    const next: Theme = this.current === 'dark' ? 'light' : 'dark';
    this.#override = next === this.#system ? null : next;
    writeSetting(KEY, this.#override);
    if (this.#override) document.documentElement.dataset.theme = this.#override;
    else delete document.documentElement.dataset.theme;
  }
}

export const theme = new ThemeState();
