import { describe, expect, it } from 'vitest';
import { conversationIdOf, pathOf } from './router.svelte';

describe('addresses', () => {
  it('go there and back', () => {
    for (const id of ['a', 'conv_01', 'with space', '风', 'a/b'])
      expect(conversationIdOf(pathOf(id))).toBe(id);
    expect(conversationIdOf(pathOf(null))).toBeNull();
  });

  it('that are broken lead to a new chat', () => {
    for (const path of ['/', '/c/', '/c', '/c/%', '/c/a/b', '/x/a'])
      expect(conversationIdOf(path)).toBeNull();
  });
});
