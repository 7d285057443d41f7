import * as api from '../api/client';
import { ApiError } from '../api/errors';
import type { Conversation, Message, TurnRequest } from '../api/types';
import { loadDraft, loadEdit, saveDraft, saveEdit, type EditDraft } from './drafts';
import { newestLeaf, pathTo, siblingsOf } from './tree';

/** What the rest of the page wants to hear from a session. */
export interface SessionListener {
  created(session: ChatSession, conversation: Conversation): void;
  changed(conversation: Conversation): void;
}

export interface Failure {
  error: ApiError;
  /** Does again what failed. */
  retry: () => void;
}

type Phase = 'ready' | 'loading' | 'missing' | 'failed';

/** A turn as asked for: `restore` gives back what the reader typed if the server never took it. */
interface Turn {
  request: TurnRequest;
  parentId: string | null;
  restore: () => void;
  retry: () => void;
}

// Messages on the screen that the server has not named yet.
const PENDING_USER = 'pending-user';
const PENDING_ASSISTANT = 'pending-assistant';

// Rendering Markdown for each token would cost more than it shows; an eye follows 30 steps a second as a flow.
const DELTA_INTERVAL_MS = 33;

// A stopped answer is stored by the server a moment after we hang up.
const RESYNC_DELAY_MS = 400;

const TITLE_LENGTH = 60;

function pendingMessage(
  id: string,
  role: Message['role'],
  parentId: string | null,
  content: string,
): Message {
  const status = role === 'assistant' ? 'streaming' : 'complete';
  return { id, parent_id: parentId, role, content, status, model: null, created_at: Date.now() / 1000 };
}

/** One conversation on the screen: its messages, the text being typed, and the turn that is running, if any. */
export class ChatSession {
  id = $state<string | null>(null);
  title = $state('');
  phase = $state<Phase>('ready');
  messages = $state<Message[]>([]);
  leafId = $state<string | null>(null);
  draft = $state('');
  editing = $state<EditDraft | null>(null);
  busy = $state(false);
  failure = $state<Failure | null>(null);
  loadError = $state<ApiError | null>(null);
  path = $derived(pathTo(this.messages, this.leafId));

  #listener: SessionListener;
  #abort: AbortController | null = null;
  #buffer = '';
  #bufferTimer: ReturnType<typeof setTimeout> | undefined;

  constructor(id: string | null, listener: SessionListener) {
    this.id = id;
    this.#listener = listener;
    this.draft = loadDraft(id);
    if (id !== null) {
      this.editing = loadEdit(id);
      this.phase = 'loading';
    }
  }

  async load(): Promise<void> {
    if (this.id === null) return;
    this.phase = 'loading';
    try {
      const detail = await api.getConversation(this.id);
      this.title = detail.title;
      this.messages = detail.messages;
      this.leafId = detail.leaf_id;
      this.phase = 'ready';
    } catch (cause) {
      this.loadError = ApiError.from(cause);
      this.phase = this.loadError.status === 404 ? 'missing' : 'failed';
    }
  }

  siblings(message: Message): Message[] {
    return siblingsOf(this.messages, message);
  }

  setDraft(text: string): void {
    this.draft = text;
    saveDraft(this.id, text);
  }

  setEditing(edit: EditDraft | null): void {
    this.editing = edit;
    if (this.id !== null) saveEdit(this.id, edit);
  }

  /** Sends the draft as the next message. */
  send(): void {
    const content = this.draft.trim();
    if (content === '' || this.busy || this.phase !== 'ready') return;
    // Only the field is cleared; the stored draft stays until the server has the text.
    this.draft = '';
    const parentId = this.path.at(-1)?.id ?? null;
    void this.#run({
      request: { content, parent_id: parentId },
      parentId,
      restore: () => this.setDraft([content, this.draft].filter((text) => text.trim() !== '').join('\n')),
      retry: () => this.send(),
    });
  }

  /** Sends the edited message as a new branch beside the old one. */
  saveEdit(): void {
    const edit = this.editing;
    const edited = this.messages.find((message) => message.id === edit?.id);
    const content = edit?.text.trim();
    if (!edit || !edited || !content || this.busy) return;
    this.editing = null;
    void this.#run({
      request: { content, parent_id: edited.parent_id },
      parentId: edited.parent_id,
      restore: () => this.setEditing(edit),
      retry: () => this.saveEdit(),
    });
  }

  /** Asks for another answer beside `messageId`. */
  regenerate(messageId: string): void {
    const answer = this.messages.find((message) => message.id === messageId);
    if (!answer || this.busy) return;
    void this.#run({
      request: { regenerate: messageId },
      parentId: answer.parent_id,
      restore: () => {},
      retry: () => this.regenerate(messageId),
    });
  }

  /** Asks again a question that never got an answer, as happens when the server died in between. */
  answerAgain(question: Message): void {
    if (this.busy) return;
    void this.#run({
      request: { content: question.content, parent_id: question.parent_id },
      parentId: question.parent_id,
      restore: () => {},
      retry: () => this.answerAgain(question),
    });
  }

  showBranch(messageId: string): void {
    if (this.busy) return;
    this.leafId = newestLeaf(this.messages, messageId);
    this.failure = null;
    // If the server misses this, only a reload shows the other branch: the next turn names its parent itself.
    if (this.id !== null) api.patchConversation(this.id, { leaf_id: this.leafId }).catch(() => {});
  }

  stop(): void {
    this.#abort?.abort();
  }

  async #run(turn: Turn): Promise<void> {
    const previousLeaf = this.leafId;
    const abort = (this.#abort = new AbortController());
    this.busy = true;
    this.failure = null;
    this.#showPending(turn);
    const progress = { taken: false, finished: false };
    try {
      const id = await this.#ensureConversation(turn.request);
      abort.signal.throwIfAborted();
      await this.#follow(id, turn, abort.signal, progress);
      if (!progress.finished) throw new ApiError('The stream ended early.', 0, 'connection_lost');
    } catch (cause) {
      this.#flush();
      if (!progress.taken) this.#takeBack(turn, previousLeaf);
      if (abort.signal.aborted) {
        this.#endAnswer('stopped');
        setTimeout(() => void this.#resync(turn, progress.taken), RESYNC_DELAY_MS);
      } else {
        this.#endAnswer('error');
        this.#fail(ApiError.from(cause), turn, progress.taken);
      }
    } finally {
      this.busy = false;
      this.#abort = null;
    }
  }

  #showPending({ request, parentId }: Turn): void {
    let answerParent = parentId;
    if ('content' in request) {
      this.messages.push(pendingMessage(PENDING_USER, 'user', parentId, request.content));
      answerParent = PENDING_USER;
    }
    this.messages.push(pendingMessage(PENDING_ASSISTANT, 'assistant', answerParent, ''));
    this.leafId = PENDING_ASSISTANT;
  }

  async #ensureConversation(request: TurnRequest): Promise<string> {
    if (this.id !== null) return this.id;
    const conversation = await api.createConversation();
    this.id = conversation.id;
    if ('content' in request) {
      saveDraft(null, '');
      saveDraft(this.id, request.content);
      // Shown until the server sends its own title with the end of the turn.
      this.title = conversation.title || request.content.replace(/\s+/g, ' ').slice(0, TITLE_LENGTH);
    }
    this.#listener.created(this, { ...conversation, title: this.title });
    return this.id;
  }

  async #follow(
    id: string,
    turn: Turn,
    signal: AbortSignal,
    progress: { taken: boolean; finished: boolean },
  ): Promise<void> {
    for await (const event of api.streamTurn(id, turn.request, signal)) {
      switch (event.type) {
        case 'user_message':
          this.#replace(PENDING_USER, event.message);
          this.#markTaken(progress);
          break;
        case 'assistant_start':
          this.#replace(PENDING_ASSISTANT, { ...event.message, status: 'streaming' });
          this.#markTaken(progress);
          break;
        case 'delta':
          this.#buffer += event.text;
          this.#bufferTimer ??= setTimeout(() => this.#flush(), DELTA_INTERVAL_MS);
          break;
        case 'done':
          this.#flush();
          this.#replace(event.message.id, event.message);
          this.title = event.conversation.title;
          this.#listener.changed(event.conversation);
          progress.finished = true;
          break;
        case 'error':
          throw ApiError.fromBody(event.error, 200);
      }
    }
  }

  /** The server has the reader's text now; what is kept from here on is what was typed since. */
  #markTaken(progress: { taken: boolean }): void {
    if (progress.taken) return;
    progress.taken = true;
    saveDraft(this.id, this.draft);
    if (this.id !== null) saveEdit(this.id, this.editing);
  }

  /** Puts the server's message in the place of `id`, and lets everything that hung on `id` hang on it. */
  #replace(id: string, message: Message): void {
    const index = this.messages.findIndex((other) => other.id === id);
    if (index < 0) this.messages.push(message);
    else this.messages[index] = message;
    for (const other of this.messages) if (other.parent_id === id) other.parent_id = message.id;
    if (this.leafId === id) this.leafId = message.id;
  }

  #streaming(): Message | undefined {
    return this.messages.findLast((message) => message.status === 'streaming');
  }

  #flush(): void {
    clearTimeout(this.#bufferTimer);
    this.#bufferTimer = undefined;
    const answer = this.#streaming();
    if (answer) answer.content += this.#buffer;
    this.#buffer = '';
  }

  #endAnswer(status: 'stopped' | 'error'): void {
    const answer = this.#streaming();
    if (answer) answer.status = status;
  }

  /** The server never took the turn: leave no trace of it but the text, back where it was typed. */
  #takeBack(turn: Turn, previousLeaf: string | null): void {
    this.messages = this.messages.filter(({ id }) => id !== PENDING_USER && id !== PENDING_ASSISTANT);
    this.leafId = previousLeaf;
    turn.restore();
  }

  #fail(error: ApiError, turn: Turn, taken: boolean): void {
    const leaf = this.path.at(-1);
    // "Cannot be reached" would be wrong: it was, and then it fell silent in the middle.
    if (taken && error.status === 0) error = new ApiError(error.message, 0, 'connection_lost');
    if (!taken || !leaf) {
      this.failure = { error, retry: turn.retry };
    } else if (leaf.id !== PENDING_ASSISTANT) {
      this.failure = { error, retry: () => this.regenerate(leaf.id) };
    } else {
      // The question arrived, but the server has no answer that could be regenerated: ask once more.
      const question = this.path.at(-2);
      this.messages = this.messages.filter(({ id }) => id !== PENDING_ASSISTANT);
      this.leafId = question?.id ?? null;
      this.failure = { error, retry: () => question && this.answerAgain(question) };
    }
  }

  /**
   * After a stop the server's word counts: it may have stored a little more than arrived here, or a question whose
   * receipt we did not wait for. Until it shows the stopped answer, what is on the screen stays.
   */
  async #resync(turn: Turn, taken: boolean): Promise<void> {
    if (this.id === null || this.busy) return;
    const detail = await api.getConversation(this.id).catch(() => null);
    if (!detail || this.busy) return;
    if (detail.title) {
      this.title = detail.title;
      this.#listener.changed(detail);
    }
    const known = new Map(detail.messages.map((message) => [message.id, message]));
    const complete = this.messages.every((ours) => {
      const theirs = known.get(ours.id);
      return theirs !== undefined && theirs.content.length >= ours.content.length;
    });
    const hasMore = detail.messages.length > this.messages.length;
    if (!complete || (!taken && !hasMore)) {
      this.#dropUnnamedAnswer();
      return;
    }
    this.messages = detail.messages;
    if (this.leafId === null || !known.has(this.leafId) || !taken) this.leafId = detail.leaf_id;
    // The text that was given back when we stopped has arrived after all.
    if (taken || !('content' in turn.request)) return;
    if (this.draft === turn.request.content) this.setDraft('');
    if (this.editing?.text.trim() === turn.request.content) this.setEditing(null);
  }

  /** Stopped between the receipt of the question and the start of the answer: there is no answer to act on. */
  #dropUnnamedAnswer(): void {
    const pending = this.messages.find(({ id }) => id === PENDING_ASSISTANT);
    if (!pending) return;
    this.messages = this.messages.filter((message) => message !== pending);
    if (this.leafId === PENDING_ASSISTANT) this.leafId = pending.parent_id;
  }
}
