/** Questions that the embedded model can answer, for people who meet it for the first time. */

const WORD_PROBLEMS = [
  {
    label: "Sam's oranges",
    question:
      "Sam starts the day with 74 oranges. A lucky day leaves him with 11 times as many. He packs " +
      "his oranges in 2 equal boxes and keeps one. He throws away 207 spoiled oranges. How many " +
      "oranges does that leave him with?",
  },
  {
    label: "A basket of pears",
    question:
      "There are 34 pears in Anna's basket. The bus ride costs 9 dollars. A month later, she has 6 " +
      "times that number. She donates 106 pears to a school, and then she gives away half of the " +
      "rest. Her cousin asks for 7 pears and gets them. Can you tell how many pears she has now?",
  },
  {
    label: "Emil's stickers",
    question:
      "Emil has 332 stickers. He throws away 291 damaged stickers. A month later, he has twice that " +
      "number. Later, he finds 26 stickers in the kitchen. He keeps collecting until he has 8 times " +
      "as many. During a sale, he buys another 14 stickers. After that, he buys 25 more stickers. " +
      "How many stickers does he have in the end?",
  },
];

/** Return examples for a model; none for one that this page does not know. */
export function examplesFor(model) {
  return model.name.startsWith("word-problems") ? WORD_PROBLEMS : [];
}
