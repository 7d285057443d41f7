/** Two places exist: `/` is a new chat and `/c/<id>` a conversation. The server answers both with the same page. */

export function conversationIdOf(pathname: string): string | null {
  const match = /^\/c\/([^/]+)\/?$/.exec(pathname);
  if (!match?.[1]) return null;
  try {
    return decodeURIComponent(match[1]);
  } catch {
    return null; // a stray % in a hand-typed address
  }
}

export const pathOf = (conversationId: string | null): string =>
  conversationId === null ? '/' : `/c/${encodeURIComponent(conversationId)}`;

class Router {
  conversationId = $state<string | null>(conversationIdOf(location.pathname));

  constructor() {
    window.addEventListener('popstate', () => (this.conversationId = conversationIdOf(location.pathname)));
  }

  go(conversationId: string | null): void {
    const path = pathOf(conversationId);
    if (path !== location.pathname) history.pushState(null, '', path);
    this.conversationId = conversationId;
  }
}

export const router = new Router();

/** Whether a click on a link is ours to follow; a click for a new tab or window is the browser's. */
export const isPlainClick = (event: MouseEvent): boolean =>
  event.button === 0 && !event.metaKey && !event.ctrlKey && !event.shiftKey && !event.altKey;
