/** Whether the server lets this browser in, as its last answers told. */
class Access {
  signedOut = $state(false);
  /** A sign-in link was opened that had been used before, or was too old. */
  linkFailed = $state(false);
}

export const access = new Access();
