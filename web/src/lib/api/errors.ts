import type { ErrorBody } from './types';

/** Any failed request. `status` 0 means that no answer came: the server is down or the network is. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string | null = null,
  ) {
    super(message);
    this.name = 'ApiError';
  }

  static fromBody(body: ErrorBody, status: number): ApiError {
    return new ApiError(body.message, status, body.code);
  }

  /** Reads the error body of a failed response; a proxy in between may have answered with anything at all. */
  static async fromResponse(response: Response): Promise<ApiError> {
    const body: unknown = await response.json().catch(() => null);
    const error = (body as { error?: ErrorBody } | null)?.error;
    if (error && typeof error.message === 'string') return ApiError.fromBody(error, response.status);
    return new ApiError(response.statusText, response.status);
  }

  static from(cause: unknown): ApiError {
    if (cause instanceof ApiError) return cause;
    return new ApiError(cause instanceof Error ? cause.message : String(cause), 0, 'network');
  }
}
