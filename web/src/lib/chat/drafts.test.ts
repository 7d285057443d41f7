import { beforeEach, describe, expect, it, vi } from 'vitest';
import { forgetDrafts, loadDraft, loadEdit, saveDraft, saveEdit } from './drafts';

beforeEach(() => sessionStorage.clear());

describe('drafts', () => {
  it('keeps one text for each conversation and one for the new chat', () => {
    saveDraft(null, 'new');
    saveDraft('a', 'in a');
    expect([loadDraft(null), loadDraft('a'), loadDraft('b')]).toEqual(['new', 'in a', '']);
  });

  it('keeps an unfinished edit, and reads a damaged one as none', () => {
    saveEdit('a', { id: 'm1', text: 'x' });
    expect(loadEdit('a')).toEqual({ id: 'm1', text: 'x' });
    sessionStorage.setItem('gale.edit.a', '{');
    expect(loadEdit('a')).toBeNull();
  });

  it('leaves nothing behind of a deleted conversation', () => {
    saveDraft('a', 'x');
    saveEdit('a', { id: 'm1', text: 'x' });
    forgetDrafts('a');
    expect(sessionStorage.length).toBe(0);
  });

  it('does not fail where storage is forbidden', () => {
    const forbidden = vi.spyOn(Storage.prototype, 'setItem').mockImplementation(() => {
      throw new Error('forbidden');
    });
    expect(() => saveDraft('a', 'x')).not.toThrow();
    forbidden.mockRestore();
  });
});
