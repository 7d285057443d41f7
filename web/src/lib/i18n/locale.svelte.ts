import { readSetting, writeSetting } from '../settings';
import { chooseLocale, MESSAGES, type Locale, type Messages } from './messages';

const KEY = 'gale.locale';

class LocaleState {
  locale = $state<Locale>(chooseLocale(readSetting(KEY), navigator.languages));

  toggle(): void {
    this.locale = this.locale === 'en' ? 'zh' : 'en';
    writeSetting(KEY, this.locale);
  }
}

export const language = new LocaleState();

/** The words of the current language; reading one inside a component follows a switch of language. */
export const t = (): Messages => MESSAGES[language.locale];
