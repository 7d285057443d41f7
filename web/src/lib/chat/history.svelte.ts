import * as api from '../api/client';
import type { Conversation } from '../api/types';

/** The list of past conversations, loaded a page at a time. */
export class ConversationHistory {
  conversations = $state<Conversation[]>([]);
  filter = $state('');
  loading = $state(false);
  failed = $state(false);
  #cursor = $state<string | null>(null);
  hasMore = $derived(this.#cursor !== null);

  matching = $derived.by(() => {
    const needle = this.filter.trim().toLocaleLowerCase();
    if (needle === '') return this.conversations;
    return this.conversations.filter(({ title }) => title.toLocaleLowerCase().includes(needle));
  });

  async load(): Promise<void> {
    this.#cursor = null;
    await this.#fetchPage();
  }

  async loadMore(): Promise<void> {
    if (this.#cursor !== null) await this.#fetchPage();
  }

  /** A filter that searched only what happens to be loaded would seem to have lost the rest. */
  async loadAll(): Promise<void> {
    while (this.#cursor !== null && !this.failed && !this.loading) await this.#fetchPage();
  }

  async #fetchPage(): Promise<void> {
    if (this.loading) return;
    this.loading = true;
    try {
      const page = await api.listConversations(this.#cursor);
      const listed = new Set(page.conversations.map(({ id }) => id));
      this.conversations = [...this.conversations.filter(({ id }) => !listed.has(id)), ...page.conversations];
      this.#cursor = page.next_cursor;
      this.failed = false;
    } catch {
      this.failed = true;
    } finally {
      this.loading = false;
    }
  }

  upsert({ id, title, created_at, updated_at }: Conversation): void {
    const conversation = { id, title, created_at, updated_at };
    this.conversations = [conversation, ...this.conversations.filter((other) => other.id !== id)];
  }

  async rename(id: string, title: string): Promise<Conversation> {
    const renamed = await api.patchConversation(id, { title });
    const index = this.conversations.findIndex((conversation) => conversation.id === id);
    const listed = this.conversations[index];
    if (listed) listed.title = renamed.title;
    return renamed;
  }

  async remove(id: string): Promise<void> {
    await api.deleteConversation(id);
    this.conversations = this.conversations.filter((conversation) => conversation.id !== id);
  }
}
