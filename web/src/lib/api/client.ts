import { access } from '../access.svelte';
import { ApiError } from './errors';
import { readEvents } from './sse';
import type {
  Conversation,
  ConversationDetail,
  ConversationPage,
  ConversationPatch,
  Info,
  TurnEvent,
  TurnRequest,
} from './types';

async function request(
  method: string,
  path: string,
  body?: unknown,
  signal?: AbortSignal,
): Promise<Response> {
  const init: RequestInit = { method, headers: { accept: 'application/json' } };
  if (signal) init.signal = signal;
  if (body !== undefined) {
    init.headers = { ...init.headers, 'content-type': 'application/json' };
    init.body = JSON.stringify(body);
  }
  const response = await fetch(`/api${path}`, init);
  if (response.status === 401) access.signedOut = true;
  if (!response.ok) throw await ApiError.fromResponse(response);
  return response;
}

async function json<T>(method: string, path: string, body?: unknown): Promise<T> {
  try {
    return (await (await request(method, path, body)).json()) as T;
  } catch (cause) {
    throw ApiError.from(cause);
  }
}

const conversationPath = (id: string) => `/conversations/${encodeURIComponent(id)}`;

/** Exchanges the token of a sign-in link for a cookie; false where the link does not work. */
export async function signIn(token: string): Promise<boolean> {
  const response = await fetch('/api/sign-in', {
    method: 'POST',
    headers: { accept: 'application/json', 'content-type': 'application/json' },
    body: JSON.stringify({ token }),
  }).catch(() => null);
  return response?.ok ?? false;
}

export const signOut = () => request('POST', '/sign-out');

export const getInfo = () => json<Info>('GET', '/info');

export function listConversations(cursor: string | null, limit = 50): Promise<ConversationPage> {
  const query = new URLSearchParams({ limit: String(limit) });
  if (cursor !== null) query.set('cursor', cursor);
  return json('GET', `/conversations?${query}`);
}

export const createConversation = () => json<Conversation>('POST', '/conversations', {});

export const getConversation = (id: string) => json<ConversationDetail>('GET', conversationPath(id));

export const patchConversation = (id: string, patch: ConversationPatch) =>
  json<Conversation>('PATCH', conversationPath(id), patch);

export async function deleteConversation(id: string): Promise<void> {
  try {
    await request('DELETE', conversationPath(id));
  } catch (cause) {
    const error = ApiError.from(cause);
    // Already gone is what was asked for.
    if (error.status !== 404) throw error;
  }
}

/** Runs one turn and yields what happens in it. Aborting `signal` makes the server stop and keep what it has. */
export async function* streamTurn(
  conversationId: string,
  turn: TurnRequest,
  signal: AbortSignal,
): AsyncGenerator<TurnEvent> {
  const response = await request('POST', `${conversationPath(conversationId)}/turns`, turn, signal);
  if (!response.body) throw new ApiError('The answer has no body.', 0, 'network');
  for await (const { name, data } of readEvents(response.body)) {
    yield { type: name, ...JSON.parse(data) } as TurnEvent;
  }
}
