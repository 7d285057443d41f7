import { readSetting, writeSetting } from './settings';

const KEY = 'gale.sidebar';

/** Below this width the sidebar lies over the conversation instead of beside it; app.css uses the same width. */
export const NARROW = '(max-width: 47.99rem)';

class SidebarState {
  #media = window.matchMedia(NARROW);
  narrow = $state(false);
  open = $state(true);

  constructor() {
    const follow = () => {
      this.narrow = this.#media.matches;
      this.open = !this.narrow && readSetting(KEY) !== 'closed';
    };
    follow();
    this.#media.addEventListener('change', follow);
  }

  toggle(): void {
    this.open = !this.open;
    // A drawer is opened for one choice; only the state beside the conversation is a lasting wish.
    if (!this.narrow) writeSetting(KEY, this.open ? null : 'closed');
  }

  /** After a choice was made in the drawer. */
  closeDrawer(): void {
    if (this.narrow) this.open = false;
  }
}

export const sidebar = new SidebarState();
