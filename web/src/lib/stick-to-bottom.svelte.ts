/**
 * Keeps a scrolling element at its end while its content grows, until the reader scrolls up. Attach with
 * `{@attach stick.attach}` to an element whose only child is the content.
 */
export class StickToBottom {
  pinned = $state(true);
  #element: HTMLElement | undefined;

  attach = (element: HTMLElement): (() => void) => {
    this.#element = element;
    let lastTop = element.scrollTop;
    const onScroll = () => {
      const distance = element.scrollHeight - element.clientHeight - element.scrollTop;
      // Growing content also raises the distance; only a move upwards is the reader's wish to stay.
      if (distance < 32) this.pinned = true;
      else if (element.scrollTop < lastTop) this.pinned = false;
      lastTop = element.scrollTop;
    };
    const follow = () => {
      if (this.pinned) this.#jump();
      else onScroll();
    };
    element.addEventListener('scroll', onScroll, { passive: true });
    const observer = new ResizeObserver(follow);
    observer.observe(element);
    if (element.firstElementChild) observer.observe(element.firstElementChild);
    return () => {
      element.removeEventListener('scroll', onScroll);
      observer.disconnect();
    };
  };

  #jump(): void {
    if (this.#element) this.#element.scrollTop = this.#element.scrollHeight;
  }

  toBottom(): void {
    this.pinned = true;
    this.#jump();
  }
}
