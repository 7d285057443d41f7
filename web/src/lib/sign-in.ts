/** The token in the address that signs a browser in, `/#sign-in=<token>`; null in any other address. */
export function tokenIn(hash: string): string | null {
  const match = /^#sign-in=([A-Za-z0-9_-]+)$/.exec(hash);
  return match?.[1] ?? null;
}

/** Takes the token out of the address, so that neither history nor a shared screen keeps it. */
export function takeToken(): string | null {
  const token = tokenIn(location.hash);
  if (token !== null) history.replaceState(null, '', location.pathname + location.search);
  return token;
}
