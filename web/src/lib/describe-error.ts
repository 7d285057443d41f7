import type { ApiError } from './api/errors';
import type { Messages } from './i18n/messages';

function isBusy({ status, code, message }: ApiError): boolean {
  // A 503 with words of its own (a full disk, say) is not about being busy.
  return status === 429 || code === 'engine_overloaded' || (status === 503 && message === '');
}

/** What a failed request means to the person in front of it. `first` tells that no message came before. */
export function describeError(error: ApiError, t: Messages, first: boolean): string {
  if (error.code === 'context_length_exceeded') return first ? t.errorContextFirst : t.errorContext;
  if (error.code === 'connection_lost') return t.errorLost;
  if (error.status === 0) return t.errorOffline;
  if (error.status === 404) return t.missing;
  if (isBusy(error)) return t.errorBusy;
  return error.message ? t.errorDetail(error.message) : t.errorOther;
}
