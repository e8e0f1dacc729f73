package etcdapi

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
)

// TestLostValuesAreLoggedOnce: each once, however often it is read, and nothing that may pass by
// itself.
func TestLostValuesAreLoggedOnce(t *testing.T) {
	var log bytes.Buffer
	c := NewCore(nil, 0, slog.New(slog.NewTextHandler(&log, nil)))
	for i := range 3 {
		for _, key := range []string{"a", "b"} {
			// the KMS counts its calls
			text := fmt.Sprintf("key %s is damaged (Decrypt, request ID %q, HTTP 400)", key, fmt.Sprint(i))
			if err := c.status(&SealError{Code: codes.DataLoss, Text: text}, true); err == nil {
				t.Fatal("no error for the client")
			}
		}
		// what it returns is tested elsewhere
		_ = c.status(&SealError{Code: codes.Unavailable, Text: "the KMS sleeps"}, true)
	}
	if got := log.String(); strings.Count(got, "\n") != 2 || !strings.Contains(got, "key a is damaged") || !strings.Contains(got, "key b is damaged") {
		t.Errorf("logged:\n%s", got)
	}
}
