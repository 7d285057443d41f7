import { describe, expect, it } from 'vitest';
import { ApiError } from './api/errors';
import { describeError } from './describe-error';
import { MESSAGES } from './i18n/messages';

const t = MESSAGES.en;

describe('describeError', () => {
  it.each([
    [new ApiError('fetch failed', 0, 'network'), t.errorOffline],
    [new ApiError('', 0, 'connection_lost'), t.errorLost],
    [new ApiError('', 503), t.errorBusy],
    [new ApiError('', 429), t.errorBusy],
    [new ApiError('', 404), t.missing],
    [new ApiError('disk full', 500), t.errorDetail('disk full')],
    [new ApiError('', 502), t.errorOther],
    [new ApiError('too long', 400, 'context_length_exceeded'), t.errorContext],
  ])('says what to do about %s', (error, text) => {
    expect(describeError(error, t, false)).toBe(text);
  });

  it('does not send a first message into yet another new chat', () => {
    const error = new ApiError('too long', 400, 'context_length_exceeded');
    expect(describeError(error, t, true)).toBe(t.errorContextFirst);
  });
});

describe('ApiError.fromResponse', () => {
  it('reads the error body, and copes with a proxy that sends a page', async () => {
    const body = { error: { message: 'No.', type: 'x', code: 'c', param: null } };
    const ours = await ApiError.fromResponse(new Response(JSON.stringify(body), { status: 400 }));
    expect([ours.message, ours.status, ours.code]).toEqual(['No.', 400, 'c']);
    const theirs = await ApiError.fromResponse(
      new Response('<html>', { status: 502, statusText: 'Bad Gateway' }),
    );
    expect([theirs.message, theirs.status, theirs.code]).toEqual(['Bad Gateway', 502, null]);
  });
});
