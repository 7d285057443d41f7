/**
 * Whether a key press belongs to an input method, where Enter picks a word and Escape drops it. Safari reports the
 * Enter that ends a composition after the composition, with the old key code 229 as the only trace.
 */
export const isComposing = (event: KeyboardEvent): boolean => event.isComposing || event.keyCode === 229;
