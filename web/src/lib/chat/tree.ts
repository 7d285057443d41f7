/**
 * A conversation is a tree: editing a question or regenerating an answer adds a sibling instead of overwriting, and
 * one path from the root to a leaf is shown. Lists are in order of creation.
 */
import type { Message } from '../api/types';

type Node = Pick<Message, 'id' | 'parent_id'>;

/** The messages from the root to `leafId`, or to the newest message where the leaf is not known. */
export function pathTo<M extends Node>(messages: readonly M[], leafId: string | null): M[] {
  const byId = new Map(messages.map((message) => [message.id, message]));
  const path: M[] = [];
  let node = (leafId !== null ? byId.get(leafId) : undefined) ?? messages.at(-1);
  while (node) {
    path.push(node);
    byId.delete(node.id); // a damaged tree with a loop must not hang the page
    node = node.parent_id === null ? undefined : byId.get(node.parent_id);
  }
  return path.reverse();
}

/** The alternatives at one place of the conversation, `message` included. */
export function siblingsOf<M extends Node>(messages: readonly M[], message: Node): M[] {
  return messages.filter((other) => other.parent_id === message.parent_id);
}

/** The newest message at or below `id`: where a reader left off on that branch. */
export function newestLeaf(messages: readonly Node[], id: string): string {
  // Parents come before their children, so one pass meets the whole branch, and its newest message last.
  const branch = new Set([id]);
  let leaf = id;
  for (const message of messages) {
    if (message.parent_id === null || !branch.has(message.parent_id)) continue;
    branch.add(message.id);
    leaf = message.id;
  }
  return leaf;
}
