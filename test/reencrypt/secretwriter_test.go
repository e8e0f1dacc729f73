package reencrypt

import (
	"context"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
)

// secretWriter increments a number in one Secret.
type secretWriter struct {
	t         testing.TB
	secrets   typed.SecretInterface
	name      string
	done      atomic.Int64 // updates that succeeded
	unsure    bool         // whether the last update may have succeeded
	conflicts atomic.Int64
}

func (c *secretWriter) work(ctx context.Context) {
	for ctx.Err() == nil {
		c.step(ctx)
		time.Sleep(5 * time.Millisecond) // so that the clients do not use both cores
	}
}

// settle finds out whether the last update succeeded.
func (c *secretWriter) settle() {
	for c.unsure = true; c.unsure; {
		c.read(context.Background())
	}
}

// read returns the Secret. Its number must be the one that this client, the only writer, has
// written, or one more if a response was lost.
func (c *secretWriter) read(ctx context.Context) *corev1.Secret {
	limited, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	now, err := c.secrets.Get(limited, c.name, metav1.GetOptions{})
	if err != nil {
		// The API server connects to the other proxy, or waits for a leader: a reader must not
		// notice a kill.
		if ctx.Err() == nil {
			c.t.Errorf("%s: %v", c.name, err)
		}
		return nil
	}
	count := countIn(now)
	if made := c.done.Load(); count != made && (count != made+1 || !c.unsure) {
		c.t.Errorf("%s counts %d after %d updates", c.name, count, made)
	}
	c.done.Store(count)
	c.unsure = false
	return now
}

func (c *secretWriter) step(ctx context.Context) {
	now := c.read(ctx)
	if now == nil {
		return
	}
	if now.Annotations == nil {
		now.Annotations = make(map[string]string)
	}
	now.Annotations["count"] = strconv.FormatInt(c.done.Load()+1, 10)
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	_, err := c.secrets.Update(limited, now, metav1.UpdateOptions{})
	switch {
	case err == nil:
		c.done.Add(1)
	case apierrors.IsConflict(err):
		// Also after an attempt of the API server whose response was lost.
		c.conflicts.Add(1)
		c.unsure = true
	default:
		c.unsure = true
	}
}

func countIn(s *corev1.Secret) int64 {
	n, _ := strconv.ParseInt(s.Annotations["count"], 10, 64)
	return n
}
