import { describe, expect, it } from 'vitest';
import { newestLeaf, pathTo, siblingsOf } from './tree';

const node = (id: string, parent_id: string | null) => ({ id, parent_id });

// q1 was asked, answered twice (a1, a2); q2 follows a1, then q1 was edited into q1b.
const tree = [
  node('q1', null),
  node('a1', 'q1'),
  node('a2', 'q1'),
  node('q2', 'a1'),
  node('a3', 'q2'),
  node('q1b', null),
  node('a4', 'q1b'),
];
const ids = (nodes: { id: string }[]) => nodes.map(({ id }) => id).join(' ');

describe('pathTo', () => {
  it('runs from the root to the leaf', () => {
    expect(ids(pathTo(tree, 'a3'))).toBe('q1 a1 q2 a3');
    expect(ids(pathTo(tree, 'a2'))).toBe('q1 a2');
  });

  it('ends at the newest message when the leaf is not known', () => {
    expect(ids(pathTo(tree, null))).toBe('q1b a4');
    expect(ids(pathTo(tree, 'gone'))).toBe('q1b a4');
    expect(pathTo([], null)).toEqual([]);
  });

  it('survives a missing parent and a loop', () => {
    expect(ids(pathTo([node('a', 'gone')], 'a'))).toBe('a');
    expect(ids(pathTo([node('a', 'b'), node('b', 'a')], 'a'))).toBe('b a');
  });
});

describe('siblingsOf', () => {
  it('lists the alternatives in order of creation', () => {
    expect(ids(siblingsOf(tree, node('a2', 'q1')))).toBe('a1 a2');
    expect(ids(siblingsOf(tree, node('q1', null)))).toBe('q1 q1b');
    expect(ids(siblingsOf(tree, node('a3', 'q2')))).toBe('a3');
  });
});

describe('newestLeaf', () => {
  it('lands where the branch was last continued', () => {
    expect(newestLeaf(tree, 'q1')).toBe('a3');
    expect(newestLeaf(tree, 'a1')).toBe('a3');
    expect(newestLeaf(tree, 'a2')).toBe('a2');
    expect(newestLeaf(tree, 'q1b')).toBe('a4');
  });
});
