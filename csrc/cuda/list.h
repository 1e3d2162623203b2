// A list of types, of which a plan chooses one by its place.
#pragma once

namespace clce::cuda {

template <class... Items>
struct List {};

// Calls use(Item) with the item at that place of the list.
template <class Use, class... Items>
void with_item(List<Items...>, int place, Use use) {
  int i = 0;
  ((i++ == place ? use(Items{}) : void()), ...);
}

}  // namespace clce::cuda
