/** The wire types of Gale's own HTTP API (`/api/...`). Times are unix seconds; ids are opaque strings. */

export interface Info {
  name: string;
  version: string;
  model: { id: string; context_length: number };
  /** Whether this browser is signed in; false also where nobody has to. */
  signed_in: boolean;
}

export interface Conversation {
  id: string;
  /** Empty until the first turn. */
  title: string;
  created_at: number;
  updated_at: number;
}

export interface ConversationPage {
  conversations: Conversation[];
  next_cursor: string | null;
}

export type StoredStatus = 'complete' | 'stopped' | 'length' | 'error';
export type MessageStatus = StoredStatus | 'streaming';

export interface Message {
  id: string;
  parent_id: string | null;
  role: 'user' | 'assistant';
  content: string;
  status: MessageStatus;
  model: string | null;
  created_at: number;
}

/** The messages form a tree by `parent_id`, in order of creation; the shown path runs from the root to `leaf_id`. */
export interface ConversationDetail extends Conversation {
  leaf_id: string | null;
  messages: Message[];
}

export interface ConversationPatch {
  title?: string;
  leaf_id?: string;
}

/** A new turn (or an edited one, below the same parent), or a new sibling of an answer. */
export type TurnRequest = { content: string; parent_id: string | null } | { regenerate: string };

export type TurnEvent =
  | { type: 'user_message'; message: Message }
  | { type: 'assistant_start'; message: Message }
  | { type: 'delta'; text: string }
  | { type: 'done'; message: Message; conversation: Conversation }
  | { type: 'error'; error: ErrorBody };

export interface ErrorBody {
  message: string;
  type: string;
  code: string | null;
  param: string | null;
}
