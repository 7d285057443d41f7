import type { Conversation } from '../api/types';

export const DATE_GROUPS = ['today', 'yesterday', 'week', 'older'] as const;
export type DateGroup = (typeof DATE_GROUPS)[number];

/** Which heading a moment (unix seconds) falls under. Days are the reader's calendar days, not spans of 24 hours. */
export function dateGroup(seconds: number, now: Date): DateGroup {
  const daysBack = (days: number) =>
    // The Date constructor counts in local days, so the days on which clocks change are right too.
    new Date(now.getFullYear(), now.getMonth(), now.getDate() - days).getTime() / 1000;
  if (seconds >= daysBack(0)) return 'today';
  if (seconds >= daysBack(1)) return 'yesterday';
  if (seconds >= daysBack(7)) return 'week';
  return 'older';
}

export interface ConversationGroup {
  group: DateGroup;
  conversations: Conversation[];
}

/** Groups conversations by last use, newest first; empty groups are left out. */
export function groupByDate(conversations: readonly Conversation[], now: Date): ConversationGroup[] {
  const sorted = [...conversations].sort((a, b) => b.updated_at - a.updated_at);
  return DATE_GROUPS.map((group) => ({
    group,
    conversations: sorted.filter((conversation) => dateGroup(conversation.updated_at, now) === group),
  })).filter(({ conversations }) => conversations.length > 0);
}
