import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import type { Message } from '../api/types';
import { loadDraft } from './drafts';
import { ChatSession } from './session.svelte';

const summary = { id: 'c1', title: 'Hi', created_at: 0, updated_at: 0 };
const listener = { created: vi.fn(), changed: vi.fn() };

function message(id: string, parent_id: string | null, extra: Partial<Message> = {}): Message {
  const role = id.startsWith('q') ? 'user' : 'assistant';
  return { id, parent_id, role, content: '', status: 'complete', model: null, created_at: 0, ...extra };
}

/** A server whose turn is written by the test, event by event. */
class FakeServer {
  controller!: ReadableStreamDefaultController<Uint8Array>;
  requests: { path: string; method: string; body: unknown }[] = [];
  detail: unknown = { ...summary, leaf_id: null, messages: [] };
  turnFailure: Response | null = null;
  offline = false;

  fetch = async (path: string, init: RequestInit): Promise<Response> => {
    const body: unknown = init.body ? JSON.parse(String(init.body)) : null;
    this.requests.push({ path, method: init.method ?? 'GET', body });
    if (this.offline) throw new TypeError('Failed to fetch');
    if (path.endsWith('/turns')) {
      if (this.turnFailure) return this.turnFailure;
      const stream = new ReadableStream<Uint8Array>({
        start: (controller) => void (this.controller = controller),
      });
      init.signal?.addEventListener('abort', () => this.controller.error(new DOMException('', 'AbortError')));
      return new Response(stream);
    }
    if (init.method === 'GET') return Response.json(this.detail);
    return Response.json(summary, { status: 201 });
  };

  send(name: string, data: unknown): void {
    this.controller.enqueue(new TextEncoder().encode(`event: ${name}\ndata: ${JSON.stringify(data)}\n\n`));
  }
}

let server: FakeServer;
const settle = () => vi.advanceTimersByTimeAsync(50);
const shown = (session: ChatSession) => session.path.map(({ id, content, status }) => [id, content, status]);

beforeEach(() => {
  vi.useFakeTimers();
  sessionStorage.clear();
  server = new FakeServer();
  vi.stubGlobal('fetch', server.fetch);
});

afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

async function ask(session: ChatSession, text: string): Promise<void> {
  session.setDraft(text);
  session.send();
  await settle();
}

async function answered(): Promise<ChatSession> {
  const session = new ChatSession(null, listener);
  await ask(session, 'Hello');
  server.send('user_message', { message: message('q1', null, { content: 'Hello' }) });
  server.send('assistant_start', { message: message('a1', 'q1', { status: 'streaming' }) });
  server.send('delta', { text: 'Hi ' });
  server.send('delta', { text: 'there' });
  server.send('done', { message: message('a1', 'q1', { content: 'Hi there' }), conversation: summary });
  server.controller.close();
  await settle();
  return session;
}

describe('a turn', () => {
  it('shows the question at once, then the answer as it grows, then its end', async () => {
    const session = new ChatSession(null, listener);
    await ask(session, ' Hello ');
    expect(session.draft).toBe('');
    expect(session.path.map(({ content, status }) => [content, status])).toEqual([
      ['Hello', 'complete'],
      ['', 'streaming'],
    ]);
    server.send('user_message', { message: message('q1', null, { content: 'Hello' }) });
    server.send('assistant_start', { message: message('a1', 'q1', { status: 'streaming' }) });
    server.send('delta', { text: 'Hi' });
    await settle();
    expect(shown(session)).toEqual([
      ['q1', 'Hello', 'complete'],
      ['a1', 'Hi', 'streaming'],
    ]);
    server.send('done', {
      message: message('a1', 'q1', { content: 'Hi', status: 'length' }),
      conversation: summary,
    });
    server.controller.close();
    await settle();
    expect(shown(session).at(-1)).toEqual(['a1', 'Hi', 'length']);
    expect([session.busy, session.title, loadDraft('c1'), loadDraft(null)]).toEqual([false, 'Hi', '', '']);
  });

  it('hangs the next question on the end of the shown path', async () => {
    const session = await answered();
    await ask(session, 'More');
    expect(server.requests.at(-1)?.body).toEqual({ content: 'More', parent_id: 'a1' });
  });

  it('puts another answer beside the old one', async () => {
    const session = await answered();
    session.regenerate('a1');
    await settle();
    expect(server.requests.at(-1)?.body).toEqual({ regenerate: 'a1' });
    server.send('assistant_start', { message: message('a2', 'q1', { status: 'streaming' }) });
    server.send('done', { message: message('a2', 'q1', { content: 'Hey' }), conversation: summary });
    server.controller.close();
    await settle();
    expect(shown(session).at(-1)).toEqual(['a2', 'Hey', 'complete']);
    expect(session.siblings(session.path.at(-1)!)).toHaveLength(2);
    session.showBranch('a1');
    expect(shown(session).at(-1)?.[0]).toBe('a1');
  });

  it('sends an edited question as a branch beside it', async () => {
    const session = await answered();
    session.setEditing({ id: 'q1', text: 'Hello!!' });
    session.saveEdit();
    await settle();
    expect(server.requests.at(-1)?.body).toEqual({ content: 'Hello!!', parent_id: null });
    expect(session.path.map(({ content }) => content)).toEqual(['Hello!!', '']);
  });
});

describe('nothing typed is lost', () => {
  it('when the server is not there', async () => {
    server.offline = true;
    const session = new ChatSession(null, listener);
    await ask(session, 'precious');
    expect([session.draft, session.path.length, session.failure?.error.code]).toEqual([
      'precious',
      0,
      'network',
    ]);

    server.offline = false;
    session.failure?.retry();
    await settle();
    expect([session.draft, session.failure]).toEqual(['', null]);
    expect(server.requests.at(-1)?.body).toEqual({ content: 'precious', parent_id: null });
  });

  it('when the turn is refused while the next text is being typed', async () => {
    const session = await answered();
    server.turnFailure = Response.json(
      { error: { message: 'no', code: 'context_length_exceeded' } },
      { status: 400 },
    );
    session.setDraft('first');
    session.send();
    session.setDraft('second');
    await settle();
    expect(session.draft).toBe('first\nsecond');
    expect(loadDraft('c1')).toBe('first\nsecond');
    expect(shown(session).map(([id]) => id)).toEqual(['q1', 'a1']);
  });

  it('when the page is closed before the server has the text', async () => {
    const session = await answered();
    await ask(session, 'on its way');
    expect(loadDraft('c1')).toBe('on its way');
  });

  it('when an edit is refused', async () => {
    const session = await answered();
    server.offline = true;
    session.setEditing({ id: 'q1', text: 'edited' });
    session.saveEdit();
    await settle();
    expect(session.editing).toEqual({ id: 'q1', text: 'edited' });
    expect(shown(session).map(([id]) => id)).toEqual(['q1', 'a1']);
  });

  it('when the reader stops before the server has the text', async () => {
    const session = await answered();
    await ask(session, 'wait');
    session.stop();
    await settle();
    expect([session.draft, session.busy, session.failure]).toEqual(['wait', false, null]);
  });
});

describe('an answer that does not end well', () => {
  async function started(): Promise<ChatSession> {
    const session = new ChatSession(null, listener);
    await ask(session, 'Hello');
    server.send('user_message', { message: message('q1', null, { content: 'Hello' }) });
    server.send('assistant_start', { message: message('a1', 'q1', { status: 'streaming' }) });
    server.send('delta', { text: 'Hi' });
    await settle();
    return session;
  }

  it('is kept when stopped, and completed by what the server stored', async () => {
    const session = await started();
    session.stop();
    await settle();
    expect(shown(session).at(-1)).toEqual(['a1', 'Hi', 'stopped']);
    const stored = [
      message('q1', null, { content: 'Hello' }),
      message('a1', 'q1', { content: 'Hi th', status: 'stopped' }),
    ];
    server.detail = { ...summary, title: 'Greeting', leaf_id: 'a1', messages: stored };
    await vi.advanceTimersByTimeAsync(1000);
    expect(shown(session).at(-1)).toEqual(['a1', 'Hi th', 'stopped']);
    expect(session.title).toBe('Greeting');
  });

  it('is not replaced by a server that has stored less', async () => {
    const session = await started();
    session.stop();
    server.detail = { ...summary, leaf_id: 'q1', messages: [message('q1', null, { content: 'Hello' })] };
    await vi.advanceTimersByTimeAsync(1000);
    expect(shown(session).at(-1)).toEqual(['a1', 'Hi', 'stopped']);
  });

  it.each([
    ['an error event', () => server.send('error', { error: { message: 'engine died', code: null } }), null],
    ['a stream cut off', () => server.controller.close(), 'connection_lost'],
    ['a lost connection', () => server.controller.error(new TypeError('network error')), 'connection_lost'],
  ])('keeps its text after %s and can be asked for again', async (_, breakIt, code) => {
    const session = await started();
    breakIt();
    await settle();
    expect(shown(session).at(-1)).toEqual(['a1', 'Hi', 'error']);
    expect(session.failure?.error.code).toBe(code);
    session.failure?.retry();
    await settle();
    expect(server.requests.at(-1)?.body).toEqual({ regenerate: 'a1' });
  });

  it('asks again when the server took the question but never began to answer', async () => {
    const session = new ChatSession(null, listener);
    await ask(session, 'Hello');
    server.send('user_message', { message: message('q1', null, { content: 'Hello' }) });
    server.controller.close();
    await settle();
    expect(shown(session)).toEqual([['q1', 'Hello', 'complete']]);
    session.failure?.retry();
    await settle();
    expect(server.requests.at(-1)?.body).toEqual({ content: 'Hello', parent_id: null });
  });
});
