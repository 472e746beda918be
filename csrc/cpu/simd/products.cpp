// The one place where products.h is compiled.
#define LCW_PRODUCTS_HERE
#include "products.h"
