/** Lets a textarea be as tall as its text, up to its own `max-height`. `text` is read so that each change is followed. */
export const autogrow = (text: () => string) => (area: HTMLTextAreaElement) => {
  text();
  // Newer browsers have `field-sizing: content`; measuring works in all of them.
  area.style.height = 'auto';
  area.style.height = `${area.scrollHeight}px`;
};
