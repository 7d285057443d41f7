/**
 * Text that was typed and not yet sent, kept for each conversation until the tab is closed, so that neither a reload
 * nor a look at another conversation loses it.
 */

export interface EditDraft {
  id: string;
  text: string;
}

const draftKey = (conversationId: string | null) => `gale.draft.${conversationId ?? 'new'}`;
const editKey = (conversationId: string) => `gale.edit.${conversationId}`;

// Storage can be full or forbidden. A draft is a courtesy: without storage the page must work all the same.
function read(key: string): string {
  try {
    return sessionStorage.getItem(key) ?? '';
  } catch {
    return '';
  }
}

function write(key: string, value: string): void {
  try {
    if (value === '') sessionStorage.removeItem(key);
    else sessionStorage.setItem(key, value);
  } catch {
    // See above.
  }
}

export const loadDraft = (conversationId: string | null) => read(draftKey(conversationId));
export const saveDraft = (conversationId: string | null, text: string) =>
  write(draftKey(conversationId), text);

export function loadEdit(conversationId: string): EditDraft | null {
  try {
    return JSON.parse(read(editKey(conversationId)) || 'null') as EditDraft | null;
  } catch {
    return null;
  }
}

export const saveEdit = (conversationId: string, edit: EditDraft | null) =>
  write(editKey(conversationId), edit ? JSON.stringify(edit) : '');

export function forgetDrafts(conversationId: string): void {
  saveDraft(conversationId, '');
  saveEdit(conversationId, null);
}
