import { access } from './access.svelte';
import * as api from './api/client';
import type { Conversation, Info } from './api/types';
import { forgetDrafts } from './chat/drafts';
import { ConversationHistory } from './chat/history.svelte';
import { ChatSession, type SessionListener } from './chat/session.svelte';
import { router } from './router.svelte';
import { takeToken } from './sign-in';

/** Everything the page holds: the server's data sheet, the list of conversations and the one that is shown. */
class Workspace {
  info = $state<Info | null>(null);
  history = new ConversationHistory();

  // Answers go on arriving while the reader looks at another conversation.
  #running = new Map<string, ChatSession>();

  #listener: SessionListener = {
    created: (session, conversation) => {
      this.history.upsert(conversation);
      if (this.session === session) router.go(conversation.id);
      else this.#running.set(conversation.id, session);
    },
    changed: (conversation) => this.history.upsert(conversation),
  };

  session = $state<ChatSession>(new ChatSession(router.conversationId, this.#listener));

  /** Loads everything that is on the screen; again after the server could not be reached. */
  async start(): Promise<void> {
    const token = takeToken();
    if (token !== null) access.linkFailed = !(await api.signIn(token));
    access.signedOut = false;
    await Promise.all([this.session.load(), this.history.load(), this.loadInfo()]);
  }

  async signOut(): Promise<void> {
    await api.signOut();
    location.assign('/'); // what was on the screen is nobody's now
  }

  async loadInfo(): Promise<void> {
    this.info = await api.getInfo().catch(() => null);
  }

  /** Shows a conversation, or a new one for null. */
  open(id: string | null): void {
    if (this.session.id === id) return;
    if (this.session.busy && this.session.id !== null) this.#running.set(this.session.id, this.session);
    for (const [key, session] of this.#running) if (!session.busy) this.#running.delete(key);

    const running = id === null ? undefined : this.#running.get(id);
    this.session = running ?? new ChatSession(id, this.#listener);
    if (!running) void this.session.load();
  }

  /** A new chat that begins with `draft`, for a text that no longer fits where it was written. */
  startOverWith(draft: string): void {
    const old = this.session;
    router.go(null);
    this.open(null);
    if (draft === '') return;
    this.session.setDraft(draft);
    old.setDraft('');
  }

  async rename(id: string, title: string): Promise<void> {
    const renamed = await this.history.rename(id, title);
    if (this.session.id === id) this.session.title = renamed.title;
  }

  async remove(id: string): Promise<void> {
    const session = this.session.id === id ? this.session : this.#running.get(id);
    session?.stop();
    await this.history.remove(id);
    forgetDrafts(id);
    if (router.conversationId === id) router.go(null);
  }

  titleOf(conversation: Conversation, untitled: string): string {
    return conversation.title.trim() || untitled;
  }
}

export const workspace = new Workspace();
