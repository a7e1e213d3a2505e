package decisionlog_test

import (
	"testing"

	"github.com/cedarpost/cedarpost/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }
