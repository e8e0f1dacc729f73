package interop

import (
	"os"
	"testing"

	"k8s.io/klog/v2"
)

func TestMain(m *testing.M) {
	// k8s.io/apiserver logs every value that it cannot decrypt; here these are thousands, on
	// purpose.
	klog.SetLogger(klog.Logger{})
	os.Exit(m.Run())
}
