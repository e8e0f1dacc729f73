package alibaba

import (
	"context"
	"strings"
)

// RAMPolicy is a policy document of the vendor's access management (RAM), as JSON.
type RAMPolicy struct {
	Version   string         `json:"Version"`
	Statement []RAMStatement `json:"Statement"`
}

// RAMStatement is a part of a policy.
type RAMStatement struct {
	Effect   string   `json:"Effect"`
	Action   []string `json:"Action"`
	Resource []string `json:"Resource"`
}

// NewRAMPolicy returns the least that the callers of the keys need, each named as [KeyARN] returns
// it. RAM requires the permission on the key also for a request that names an alias.
func NewRAMPolicy(keyARNs ...string) *RAMPolicy {
	return &RAMPolicy{Version: "1", Statement: []RAMStatement{{
		Effect: "Allow", Action: []string{"kms:DescribeKey", "kms:GenerateDataKey", "kms:Encrypt", "kms:Decrypt"}, Resource: keyARNs,
	}}}
}

// KeyARN returns how RAM names a key; where keyID is no ARN, with any account, since a policy only
// opens what is of its own account. It is empty if keyID is an alias: only the KMS knows of which
// key, see [Backend.KeyARN].
func KeyARN(region, keyID string) string {
	id := realID(keyID)
	switch {
	case id == "":
		return ""
	case strings.HasPrefix(keyID, "acs:kms:"):
		return keyID
	}
	return "acs:kms:" + region + ":*:key/" + id
}

// KeyARN returns how RAM names the key of the backend. Where the configuration has an alias, it
// requests the key from the KMS.
func (b *Backend) KeyARN(ctx context.Context) (string, error) {
	if b.realID != "" {
		return KeyARN(b.region, b.keyID), nil
	}
	info, err := b.Describe(ctx)
	if err != nil {
		return "", err
	}
	if info.KeyID == b.keyID {
		return "", contractError("DescribeKey", info.RequestID, b.keyID, "the key has no version yet: it waits for its material")
	}
	id, _, _ := strings.Cut(info.KeyID, "/")
	return KeyARN(b.region, id), nil
}
